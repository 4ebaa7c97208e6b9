"""Prompt to sample: prompt sources, rendering, generation engines and the staleness buffer."""
