"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from rlhf.config import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Rate of optimiser step `step` (0-based): linear warm-up to the peak, then the schedule down to the minimum."""
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return peak + (low - peak) * done
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))
