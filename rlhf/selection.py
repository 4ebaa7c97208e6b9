"""Which scored groups train, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.samples import Abstained, RewardFailed, ScoredGroup


@dataclass(frozen=True, slots=True)
class Rejected:
    """A group that does not train: its final state in the ledger and the rule that decided."""

    state: Literal["filtered", "abstained", "reward_error"]
    detail: str


def select(scored: ScoredGroup, *, filter_zero_variance: bool, minimum: int = 2) -> Rejected | None:
    """None when the group trains. It needs `minimum` samples with a reward, and reward variance if asked for."""
    values = [outcome.value for _, outcome in scored.valued]
    if len(values) < minimum:
        if any(isinstance(outcome, RewardFailed) for outcome in scored.outcomes):
            return Rejected("reward_error", _first(scored, RewardFailed))
        if any(isinstance(outcome, Abstained) for outcome in scored.outcomes):
            return Rejected("abstained", _first(scored, Abstained))
        return Rejected("filtered", "too_few_samples")
    if any(sample.completion_tokens == 0 for sample, _ in scored.valued):
        return Rejected("filtered", "empty_completion")
    if filter_zero_variance and max(values) == min(values):
        return Rejected("filtered", "all_correct" if _solved(scored) else "all_wrong")
    return None


def _solved(scored: ScoredGroup) -> bool:
    return all(outcome.task > 0 for _, outcome in scored.valued)


def _first(scored: ScoredGroup, kind: type) -> str:
    return next(outcome.component for outcome in scored.outcomes if isinstance(outcome, kind))
