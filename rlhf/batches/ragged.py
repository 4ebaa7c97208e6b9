"""The records that travel to the learners: flat token arrays with offsets, without a padded slot.

    ScoredGroup -> RolloutBatch = ScoredSamples + StoredSequences            online, on the driver
                   StoredSequences -> RolloutSequences -> TrainSequences     online, on a learner rank
    SupervisedSequences | PreferenceSequences | PairSequences                from stored completions

`S` tokens of `N` sequences; sequence n has the tokens `offsets[n] <= t < offsets[n + 1]`. An array over tokens is
aligned with `token_ids`: entry t belongs to token t. The first token of a sequence has log-prob 0 and never trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from rlhf.samples import (
    PreferenceGroup,
    PreferencePair,
    PreferenceUnit,
    RewardValue,
    Sample,
    ScoredGroup,
    Stored,
    TokenizedExample,
)

SampleWeights = Callable[[Tensor], Tensor]
"""Trained tokens [N] of each sample of an optimiser step -> the weight [N] of its token losses."""

NO_TOKENS = np.zeros(0, np.float32)
"""Stands for log-probs that an algorithm does not need; to use them is a shape error."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences: `token_ids` int32 [S], `loss_mask` bool [S], `offsets` int64 [N + 1] from 0 to S."""

    per_token: ClassVar[tuple[str, ...]] = ("token_ids", "loss_mask")
    """The fields over tokens; all others except `offsets` have one entry for each sequence."""
    unit_size: ClassVar[int] = 1
    """Number of consecutive sequences that form one unit, which stays in one micro-batch."""

    token_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [N]."""
        return np.diff(self.offsets)

    @property
    def trained_tokens(self) -> np.ndarray:
        """Tokens on the loss mask of each sequence, int64 [N]."""
        before = np.concatenate([[0], np.cumsum(self.loss_mask)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    def select(self, index: np.ndarray) -> Self:
        """The sequences at `index` int64 [n], in that order, as one contiguous record."""
        lengths = self.lengths[index]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Token t of the result is token t - (its start here) + (its start there).
        shift = np.repeat(self.offsets[index] - offsets[:-1], lengths)
        return self._taken(offsets, np.arange(offsets[-1]) + shift, index)

    def slice(self, start: int, stop: int) -> Self:
        """Sequences `start <= n < stop` as views."""
        tokens = slice(self.offsets[start], self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - self.offsets[start]
        return self._taken(offsets, tokens, slice(start, stop))

    def split(self, counts: Sequence[int]) -> Iterator[Self]:
        """Consecutive parts of so many sequences each, as views."""
        start = 0
        for count in counts:
            yield self.slice(start, start + count)
            start += count

    def per_sequence(self, values: np.ndarray) -> list[np.ndarray]:
        """`values` [S] cut into one array for each sequence."""
        # np.split would make one part of no sequences at all.
        return [values[start:stop] for start, stop in pairwise(self.offsets.tolist())]

    def _taken(self, offsets: np.ndarray, tokens: Any, sequences: Any) -> Self:
        changed = {"offsets": offsets}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in self.per_token:
                changed[item.name] = value[tokens] if len(value) else value
            elif item.name != "offsets":
                changed[item.name] = value[sequences]
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class RolloutSequences(Sequences):
    """Sampled sequences. `rollout_logprobs` float32 [S]; `sample_index`, `staleness` int64 [N].

    `sample_index` is the number of the sample that a sequence belongs to; a sample may have several sequences.
    """

    per_token: ClassVar[tuple[str, ...]] = (*Sequences.per_token, "rollout_logprobs")

    rollout_logprobs: np.ndarray
    sample_index: np.ndarray
    staleness: np.ndarray


@dataclass(frozen=True, slots=True)
class StoredSequences:
    """Sampled sequences whose tokens are still where they were made; all arrays int64 [N].

    Sequence n is number `place[n]` of the group at `stored[group[n]]`, has `lengths[n]` tokens, and belongs to sample
    `sample_index[n]`; `staleness` is that of the oldest token that trains. The first `masked[n]` tokens of its
    completion do not, because they are too old.
    """

    unit_size: ClassVar[int] = 1

    stored: tuple[Stored, ...]
    group: np.ndarray
    place: np.ndarray
    lengths: np.ndarray
    sample_index: np.ndarray
    staleness: np.ndarray
    masked: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, index: np.ndarray) -> Self:
        """The sequences at `index` int64 [n], in that order, with no more groups than they need."""
        groups, group = np.unique(self.group[index], return_inverse=True)
        return replace(
            self,
            stored=tuple(self.stored[number] for number in groups),
            group=group,
            place=self.place[index],
            lengths=self.lengths[index],
            sample_index=self.sample_index[index],
            staleness=self.staleness[index],
            masked=self.masked[index],
        )

    def fetched(self) -> RolloutSequences:
        """The sequences with their tokens."""
        groups = [stored.tokens() for stored in self.stored]
        if not groups:
            none = np.zeros(0, np.float32)
            empty = Sequences(none.astype(np.int32), none.astype(bool), np.zeros(1, np.int64))
            return RolloutSequences(**_fields(empty), rollout_logprobs=none, **self._by_sequence())
        bounds = [groups[g].offsets[p : p + 2] for g, p in zip(self.group, self.place, strict=True)]
        parts = [(groups[g], slice(*bound)) for g, bound in zip(self.group, bounds, strict=True)]
        loss_mask = np.concatenate([group.loss_mask[where] for group, where in parts])
        offsets = _offsets(self.lengths)
        for number in np.flatnonzero(self.masked):
            mine = loss_mask[offsets[number] : offsets[number + 1]]
            mine[np.flatnonzero(mine)[: self.masked[number]]] = False
        return RolloutSequences(
            token_ids=np.concatenate([group.token_ids[where] for group, where in parts]),
            loss_mask=loss_mask,
            offsets=offsets,
            rollout_logprobs=np.concatenate([group.rollout_logprobs[where] for group, where in parts]),
            **self._by_sequence(),
        )

    def _by_sequence(self) -> dict[str, np.ndarray]:
        return {"sample_index": self.sample_index, "staleness": self.staleness}


@dataclass(frozen=True, slots=True)
class TrainSequences(RolloutSequences):
    """One optimiser step of a rank. `advantages`, `weights` float32 [N]; the learner's own log-probs float32.

    `weights` multiply the losses of a sequence's trained tokens; see `rlhf.losses.reduce`. `proximal_logprobs` are of
    the weights at the start of the step, [S], or [0] where this is the step's only update: they then are the policy's
    own. `reference_logprobs` are of the weights at the start of the stage, [S], or [0] without a reference.
    """

    per_token: ClassVar[tuple[str, ...]] = (*RolloutSequences.per_token, "proximal_logprobs", "reference_logprobs")

    advantages: np.ndarray
    weights: np.ndarray
    proximal_logprobs: np.ndarray
    reference_logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class SupervisedSequences(Sequences):
    """One optimiser step of supervised learning. `weights` float32 [N] as in `TrainSequences`."""

    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class PreferenceSequences(Sequences):
    """One optimiser step over stored completions. `advantages`, `weights` float32 [N].

    `reference_logprobs` float32 [S] are of the weights at the start of the stage, or [0] without a reference.
    """

    per_token: ClassVar[tuple[str, ...]] = (*Sequences.per_token, "reference_logprobs")

    advantages: np.ndarray
    weights: np.ndarray
    reference_logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class PairSequences(PreferenceSequences):
    """Preference pairs: sequences 2k and 2k + 1 are the chosen (advantage 1) and rejected (-1) completion of pair k."""

    unit_size: ClassVar[int] = 2


OptimiserStep = TrainSequences | SupervisedSequences | PreferenceSequences
"""The records on which a learner makes an optimiser step."""


@dataclass(frozen=True, slots=True)
class ScoredSamples:
    """The numbers of all `N` samples of one rollout step, from which advantages are computed.

    `rewards` float32, `correct` bool (the unshaped task metric reached `rewards.correct_at`), `group_index`,
    `completion_tokens` (those that train) and `staleness` int64; all [N].
    """

    rewards: Tensor
    correct: Tensor
    group_index: Tensor
    completion_tokens: Tensor
    staleness: Tensor

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The samples of one rollout step: their numbers for the controller, and where the learners find their tokens."""

    samples: ScoredSamples
    sequences: StoredSequences


def rollout_batch(
    groups: Sequence[ScoredGroup], version: int, correct_at: float, max_staleness: int | None = None
) -> RolloutBatch:
    """The samples of `groups` that have a reward; `version` is the learner's weight version now.

    A sample is correct when its task value is at least `correct_at`. Tokens of weights more than `max_staleness`
    versions old do not train; a sample without any other is left out.
    """
    oldest = version if max_staleness is None else version - max_staleness
    rows = [
        (number, place, sample, value, 0 if max_staleness is None else sample.tokens_before(oldest))
        for number, group in enumerate(groups)
        for place, (sample, value) in enumerate(zip(group.group.samples, group.outcomes, strict=True))
        if isinstance(value, RewardValue)
    ]
    rows = [row for row in rows if row[4] < row[2].completion_tokens]
    samples, values, masked = [row[2] for row in rows], [row[3] for row in rows], np.array([row[4] for row in rows])
    staleness = np.array([version - _trained_from(row[2], row[4]) for row in rows])
    group_index = np.array([row[0] for row in rows])
    lengths = np.array([sample.completion_tokens for sample in samples])
    return RolloutBatch(
        ScoredSamples(
            rewards=torch.tensor([value.value for value in values], dtype=torch.float32),
            correct=torch.tensor([value.task >= correct_at for value in values]),
            group_index=torch.from_numpy(group_index),
            completion_tokens=torch.from_numpy(lengths - masked),
            staleness=torch.from_numpy(staleness),
        ),
        StoredSequences(
            stored=tuple(group.group.stored for group in groups),
            group=group_index,
            place=np.array([row[1] for row in rows]),
            lengths=lengths + np.array([sample.prompt_tokens for sample in samples]),
            sample_index=np.arange(len(rows)),
            staleness=staleness,
            masked=masked,
        ),
    )


def _trained_from(sample: Sample, masked: int) -> int:
    """The version of the first completion token after `masked` ones."""
    return next(span.version for span in sample.version_spans if span.end > masked)


def train_sequences(
    rollouts: RolloutSequences,
    advantages: np.ndarray,
    weights: np.ndarray,
    *,
    proximal_logprobs: np.ndarray = NO_TOKENS,
    reference_logprobs: np.ndarray = NO_TOKENS,
) -> TrainSequences:
    """An optimiser step over `rollouts`; `advantages` and `weights` [N] are by sequence."""
    return TrainSequences(
        **_fields(rollouts),
        advantages=np.asarray(advantages),
        weights=np.asarray(weights),
        proximal_logprobs=proximal_logprobs,
        reference_logprobs=reference_logprobs,
    )


def completion_sequences(completions: Sequence[TokenizedExample]) -> Sequences:
    """Stored completions in their order."""
    return Sequences(
        token_ids=np.concatenate([completion.token_ids for completion in completions]).astype(np.int32),
        loss_mask=np.concatenate([completion.loss_mask for completion in completions]),
        offsets=_offsets([len(completion.token_ids) for completion in completions]),
    )


def unit_sequences(units: Sequence[PreferenceUnit]) -> Sequences:
    """All completions of pairs (chosen, rejected) or groups, unit after unit."""
    return completion_sequences([completion for unit in units for completion in unit.completions])


def supervised_sequences(examples: Sequence[TokenizedExample], weigh: SampleWeights) -> SupervisedSequences:
    """Examples as one optimiser step."""
    sequences = completion_sequences(examples)
    return SupervisedSequences(**_fields(sequences), weights=_weights(sequences, weigh).numpy())


def pair_sequences(pairs: Sequence[PreferencePair], weigh: SampleWeights) -> PairSequences:
    """Pairs as one optimiser step, without reference log-probs; see `with_reference`."""
    sequences = unit_sequences(pairs)
    return PairSequences(
        **_fields(sequences),
        advantages=np.tile(np.array([1.0, -1.0], np.float32), len(pairs)),
        weights=_weights(sequences, weigh).numpy(),
        reference_logprobs=NO_TOKENS,
    )


def group_sequences(
    groups: Sequence[PreferenceGroup], advantages_of: Callable[[Tensor, Tensor], Tensor], weigh: SampleWeights
) -> PreferenceSequences:
    """Groups as one optimiser step, without reference log-probs; each group counts alike, whatever its size.

    `advantages_of(rewards [N], group_index [N]) -> [N]`, in float64.
    """
    sequences = unit_sequences(groups)
    sizes = torch.tensor([len(group.completions) for group in groups])
    index = torch.arange(len(groups)).repeat_interleave(sizes)
    rewards = torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float64)
    weights = _weights(sequences, weigh)
    share = (len(sequences) / (len(groups) * sizes.to(weights.dtype)))[index]  # exactly 1 where all have one size
    return PreferenceSequences(
        **_fields(sequences),
        advantages=advantages_of(rewards, index).to(torch.float32).numpy(),
        weights=(weights * share).numpy(),
        reference_logprobs=NO_TOKENS,
    )


def with_reference(batch: PreferenceSequences, reference_logprobs: np.ndarray) -> PreferenceSequences:
    """The batch with the reference's log-probs float32 [S]."""
    assert reference_logprobs.shape == batch.token_ids.shape
    return replace(batch, reference_logprobs=reference_logprobs)


def _weights(sequences: Sequences, weigh: SampleWeights) -> Tensor:
    return weigh(torch.from_numpy(sequences.trained_tokens))


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _fields(batch: Sequences) -> dict[str, np.ndarray]:
    return {item.name: getattr(batch, item.name) for item in fields(batch)}
