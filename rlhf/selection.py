"""Which scored groups train, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Literal

from rlhf.samples import Abstained, RewardFailed, ScoredGroup


@dataclass(slots=True)
class Arrivals:
    """Everything that came back scored between two steps, trained or not: the sampler's own averages.

    The groups that train are a selection (never all correct, say), so their mean reward says nothing about the policy.
    """

    groups: int = 0
    zero_variance: int = 0
    rewards: list[float] = field(default_factory=list)
    tasks: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    completion_tokens: list[int] = field(default_factory=list)
    truncated: int = 0
    thinking: int = 0
    abstained: int = 0
    failed: int = 0

    def add(self, scored: ScoredGroup) -> None:
        values = [outcome for _, outcome in scored.valued]
        self.groups += 1
        self.zero_variance += len({outcome.value for outcome in values}) == 1
        self.rewards += [outcome.value for outcome in values]
        self.tasks += [outcome.task for outcome in values]
        for name, value in (item for outcome in values for item in outcome.parts.items()):
            self.parts.setdefault(name, []).append(value)
        self.completion_tokens += [sample.completion_tokens for sample in scored.group.samples]
        self.truncated += sum(sample.truncated for sample in scored.group.samples)
        self.thinking += sum(sample.thinks for sample in scored.group.samples)
        self.abstained += sum(isinstance(outcome, Abstained) for outcome in scored.outcomes)
        self.failed += sum(isinstance(outcome, RewardFailed) for outcome in scored.outcomes)

    def metrics(self) -> dict[str, float]:
        samples = len(self.completion_tokens)
        if not samples:
            return {}
        out = {
            "rollout/groups": self.groups,
            "rollout/samples": samples,
            "rollout/zero_variance_fraction": self.zero_variance / self.groups,
            "rollout/completion_tokens": sum(self.completion_tokens) / samples,
            "rollout/completion_tokens_max": max(self.completion_tokens),
            "rollout/truncated_fraction": self.truncated / samples,
            "rollout/thinks_fraction": self.thinking / samples,
            "reward/abstained": self.abstained,
            "reward/failed": self.failed,
        }
        if self.rewards:
            out |= {"reward/mean": fmean(self.rewards), "reward/std": pstdev(self.rewards)}
            out |= {"reward/task": fmean(self.tasks)}
            out |= {f"reward/part/{name}": fmean(values) for name, values in sorted(self.parts.items())}
        return out


@dataclass(frozen=True, slots=True)
class Rejected:
    """A group that does not train: its final state in the ledger and the rule that decided."""

    state: Literal["filtered", "abstained", "reward_error"]
    detail: str


GroupFilter = Literal["none", "zero_variance", "all_correct", "not_mixed"]
"""Groups that do not train: none, with equal rewards, with all samples correct, with all or no samples correct."""


def select(
    scored: ScoredGroup, group_filter: GroupFilter, *, correct_at: float = 1.0, minimum: int = 2
) -> Rejected | None:
    """None when the group trains. It needs `minimum` samples with a reward, and must pass the filter."""
    if len(scored.valued) < minimum:
        return _too_few(scored)
    if any(sample.completion_tokens == 0 for sample, _ in scored.valued):
        return Rejected("filtered", "empty_completion")
    rule = _filtered(scored, group_filter, correct_at)
    return None if rule is None else Rejected("filtered", rule)


def _too_few(scored: ScoredGroup) -> Rejected:
    if any(isinstance(outcome, RewardFailed) for outcome in scored.outcomes):
        return Rejected("reward_error", _first(scored, RewardFailed))
    if any(isinstance(outcome, Abstained) for outcome in scored.outcomes):
        return Rejected("abstained", _first(scored, Abstained))
    return Rejected("filtered", "too_few_samples")


def _filtered(scored: ScoredGroup, group_filter: GroupFilter, correct_at: float) -> str | None:
    """The rule by which `group_filter` drops the group."""
    correct = [outcome.task >= correct_at for _, outcome in scored.valued]
    kind = "all_correct" if all(correct) else "mixed_equal" if any(correct) else "all_wrong"
    if group_filter == "zero_variance":
        values = [outcome.value for _, outcome in scored.valued]
        # Shaping can make the rewards of right and wrong samples meet.
        return kind if max(values) == min(values) else None
    dropped = {"none": (), "all_correct": ("all_correct",), "not_mixed": ("all_correct", "all_wrong")}[group_filter]
    return kind if kind in dropped else None


def _first(scored: ScoredGroup, kind: type[Abstained] | type[RewardFailed]) -> str:
    return next(outcome.component for outcome in scored.outcomes if isinstance(outcome, kind))
