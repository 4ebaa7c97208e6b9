"""Metrics of a step that trains on stored data."""

from __future__ import annotations

from rlhf.phases import Phases
from rlhf.protocols import UpdateReport


def offline_metrics(report: UpdateReport, phases: Phases) -> dict[str, float]:
    """The metrics of one step of supervised or preference learning; units are in the keys."""
    seconds = sum(phases.step.values())
    return {
        "policy/loss": report.loss,
        **report.metrics.result(),
        "optim/grad_norm": report.grad_norm,
        "optim/learning_rate": report.learning_rate,
        **{f"time/{name}_s": value for name, value in phases.step.items()},
        "time/step_s": seconds,
        "perf/trained_tokens": report.trained_tokens,
        "perf/trained_tokens_per_s": report.trained_tokens / seconds,
    }
