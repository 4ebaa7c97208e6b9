"""Signals that end a run, and what a killed one leaves on its machine."""
