"""Runs that are killed, and what it costs that they can be resumed."""
