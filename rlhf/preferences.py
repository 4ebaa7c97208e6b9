"""Which completions of a scored group make a preference pair or a preference group, and why the others make none."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.config import CollectStage
from rlhf.errors import DataError
from rlhf.samples import (
    Abstained,
    PreferenceGroup,
    PreferencePair,
    PreferenceUnit,
    RewardFailed,
    RewardValue,
    Sample,
    ScoredGroup,
    TokenizedExample,
)

Reason = Literal[
    "reward_error",
    "abstained",
    "too_few_samples",
    "all_truncated",
    "no_correct",
    "no_incorrect",
    "same_length",
    "reward_gap",
    "empty_completion",
    "equal_rewards",
]
"""Why there is no pair or group.

`reward_error`, `abstained`, `too_few_samples`: not enough samples have a reward (and a completion token), because a
reward failed, because one abstained, or for neither. `all_truncated`, `no_correct`: nothing can be chosen, because no
completion (no correct completion) came to its end. `no_incorrect`: nothing can be rejected. `same_length`: both are
correct and the longest is no longer than the chosen. `reward_gap`: the rewards differ by no more than `min_reward_gap`.
`empty_completion`, `equal_rewards`: of `untrainable`.
"""


@dataclass(frozen=True, slots=True)
class Selected:
    """What was picked from one scored group: the unit that trains, and the same for people.

    Every tuple has one entry for each completion of `unit`, in its order: (chosen, rejected), or the samples of a group
    in the order they were sampled in. `prompt`: the messages as text. `completions`: decoded text, with an opened
    `<think>`. `rewards`: what the selection went by, with the stage's `weights` if it has any. `tasks`: the unshaped
    correctness. `parts`: the unweighted value of every reward component. `completion_tokens`: lengths in tokens.
    """

    unit: PreferenceUnit
    prompt_id: str
    prompt: str
    reasoning_mode: bool
    sample_ids: tuple[str, ...]
    completions: tuple[str, ...]
    rewards: tuple[float, ...]
    tasks: tuple[float, ...]
    parts: tuple[Mapping[str, float], ...]
    completion_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A sample that has a reward and at least one completion token. `place`: its number in the group."""

    place: int
    sample: Sample
    reward: float
    value: RewardValue
    correct: bool

    @property
    def tokens(self) -> int:
        return self.sample.completion_tokens

    @property
    def best_first(self) -> tuple[float, int]:
        return -self.reward, self.place

    @property
    def worst_first(self) -> tuple[float, int]:
        return self.reward, self.place


def pick_all(
    groups: Iterable[ScoredGroup], stage: CollectStage, *, correct_at: float, seed: int = 0
) -> tuple[list[Selected], Counter[Reason]]:
    """What `pick` makes of every group: the pairs or groups, and how often each reason stood against one."""
    picked = [pick(scored, stage, correct_at=correct_at, seed=seed) for scored in groups]
    return [p for p in picked if isinstance(p, Selected)], Counter(p for p in picked if not isinstance(p, Selected))


def pick(scored: ScoredGroup, stage: CollectStage, *, correct_at: float, seed: int = 0) -> Selected | Reason:
    """The pair or group that `stage` makes of `scored`, or why there is none.

    A sample is correct when its task value is at least `correct_at`. Samples that abstained or failed and empty
    completions never enter; the chosen, or best, is never truncated. Among equals the earlier sample is taken: any
    other rule would prefer short, or long, completions unasked. `seed` and the group's id decide the random members of
    a group, whatever else is collected. Raises DataError where `stage.weights` names a part that a sample lacks.
    """
    candidates = _candidates(scored, stage.weights, correct_at)
    if len(candidates) < 2:
        return _why_so_few(scored)
    if stage.produce == "pairs":
        found = _pair(candidates, stage)
        return found if not isinstance(found, tuple) else _selected_pair(scored, found)
    members = _group(candidates, stage, random.Random(f"{seed}/{scored.group.group_id}"))
    return members if not isinstance(members, tuple) else _selected_group(scored, members)


def untrainable(unit: PreferenceUnit) -> Reason | None:
    """Why a pair or group, whoever made it, would train nothing; None when it does train."""
    if not all(completion.loss_mask.any() for completion in unit.completions):
        return "empty_completion"
    if isinstance(unit, PreferenceGroup) and max(unit.rewards) == min(unit.rewards):
        return "equal_rewards"
    return None


# --- the reward of a sample -------------------------------------------------------------------------------------------


def _candidates(scored: ScoredGroup, weights: Mapping[str, float], correct_at: float) -> list[_Candidate]:
    return [
        _Candidate(place, sample, _reward(sample, value, weights), value, value.task >= correct_at)
        for place, (sample, value) in enumerate(zip(scored.group.samples, scored.outcomes, strict=True))
        if isinstance(value, RewardValue) and sample.completion_tokens
    ]


def _reward(sample: Sample, value: RewardValue, weights: Mapping[str, float]) -> float:
    if not weights:
        return value.value
    for part in weights:
        if part not in value.parts:
            raise DataError(
                f"weights.{part}: must name a part of the reward of every sample. Sample {sample.sample_id} has "
                f"{', '.join(sorted(value.parts)) or 'no parts'}. Leave the weight out, or set applies = always for "
                "the component."
            )
    return sum(weight * value.parts[part] for part, weight in weights.items())


def _why_so_few(scored: ScoredGroup) -> Reason:
    kinds = {type(outcome) for outcome in scored.outcomes}
    return "reward_error" if RewardFailed in kinds else "abstained" if Abstained in kinds else "too_few_samples"


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pair(candidates: list[_Candidate], stage: CollectStage) -> tuple[_Candidate, _Candidate] | Reason:
    chosen = _chosen(candidates, stage)
    if not isinstance(chosen, _Candidate):
        return chosen
    others = [candidate for candidate in candidates if candidate is not chosen]
    rejected = _rejected(others, stage)
    if rejected is None:
        return _against_longest_correct(chosen, others, stage)
    return (chosen, rejected) if chosen.reward - rejected.reward > stage.min_reward_gap else "reward_gap"


def _chosen(candidates: list[_Candidate], stage: CollectStage) -> _Candidate | Reason:
    finished = [candidate for candidate in candidates if not candidate.sample.truncated]
    if stage.chosen == "highest_reward":
        return _first(finished, lambda c: c.best_first) or "all_truncated"
    correct = [candidate for candidate in finished if candidate.correct]
    return _first(correct, lambda c: (c.tokens, c.place)) or "no_correct"


def _rejected(others: list[_Candidate], stage: CollectStage) -> _Candidate | None:
    """The worst by reward, of the incorrect ones where the stage says so; None without any."""
    eligible = others if stage.rejected == "lowest_reward" else [other for other in others if not other.correct]
    return _first(eligible, lambda c: c.worst_first)


def _first(candidates: list[_Candidate], order: Callable[[_Candidate], tuple[float, ...]]) -> _Candidate | None:
    return min(candidates, key=order, default=None)


def _against_longest_correct(
    chosen: _Candidate, others: list[_Candidate], stage: CollectStage
) -> tuple[_Candidate, _Candidate] | Reason:
    """Among correct completions the preference is one of length: rewards may be equal, lengths may not."""
    if stage.rejected != "incorrect_else_longest_correct" or not chosen.correct:
        return "no_incorrect"
    longest = max(others, key=lambda c: (c.tokens, -c.place))
    return (chosen, longest) if longest.tokens > chosen.tokens else "same_length"


# --- groups -----------------------------------------------------------------------------------------------------------


def _group(candidates: list[_Candidate], stage: CollectStage, rng: random.Random) -> tuple[_Candidate, ...] | Reason:
    """The best completion that came to its end, the worst, and others drawn without replacement; in sample order."""
    finished = [candidate for candidate in candidates if not candidate.sample.truncated]
    if not finished:
        return "all_truncated"
    best = min(finished, key=lambda c: c.best_first)
    below = [c for c in candidates if c is not best and (c.reward < best.reward or not c.sample.truncated)]
    if len(below) < stage.group_size - 1:
        return "too_few_samples"
    worst = min(below, key=lambda c: c.worst_first)
    if not best.reward - worst.reward > stage.min_reward_gap:
        return "reward_gap"
    others = rng.sample([c for c in below if c is not worst], stage.group_size - 2)
    return tuple(sorted((best, worst, *others), key=lambda c: c.place))


# --- records ----------------------------------------------------------------------------------------------------------


def _selected_pair(scored: ScoredGroup, picked: tuple[_Candidate, _Candidate]) -> Selected:
    chosen, rejected = _examples(scored, picked)
    return _selected(scored, PreferencePair(scored.group.group_id, chosen, rejected), picked)


def _selected_group(scored: ScoredGroup, picked: tuple[_Candidate, ...]) -> Selected:
    unit = PreferenceGroup(scored.group.group_id, _examples(scored, picked), tuple(c.reward for c in picked))
    return _selected(scored, unit, picked)


def _selected(scored: ScoredGroup, unit: PreferenceUnit, picked: tuple[_Candidate, ...]) -> Selected:
    prompt, text = scored.group.prompt, scored.group.stored.text()
    return Selected(
        unit=unit,
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        reasoning_mode=scored.group.reasoning_mode,
        sample_ids=tuple(c.sample.sample_id for c in picked),
        completions=tuple(text.samples[c.place].completion for c in picked),
        rewards=tuple(c.reward for c in picked),
        tasks=tuple(c.value.task for c in picked),
        parts=tuple(c.value.parts for c in picked),
        completion_tokens=tuple(c.tokens for c in picked),
    )


def _examples(scored: ScoredGroup, picked: Sequence[_Candidate]) -> tuple[TokenizedExample, ...]:
    tokens = scored.group.stored.tokens()
    return tuple(tokens.example(candidate.place) for candidate in picked)
