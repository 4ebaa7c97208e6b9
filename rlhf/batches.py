"""The records that train: padded torch tensors, one type for each stage.

    RolloutBatch -> AnnotatedBatch -> TrainBatch -> UpdateReport         online
    SupervisedBatch | PreferenceBatch | PairBatch -> UpdateReport        from stored completions

`N` rows of `T` tokens, padded on the right; `lengths` [N] says where padding starts (never the pad token's id: the
policy can sample it). `reference_logprobs` is [N, 0] where the algorithm needs none: to use it then is a shape error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.samples import PreferenceGroup, PreferencePair, PreferenceUnit, ScoredGroup, TokenizedExample

Weigh = Callable[[Tensor], Tensor]
"""`loss_mask` [N, T] of an optimiser step -> its `token_weights` [N, T]: the reduction of the algorithm."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What every batch has: `token_ids` int64 [N, T], `lengths` int64 [N], `loss_mask` bool [N, T]."""

    rows_per_unit: ClassVar[int] = 1
    """So many consecutive rows are one unit, which is never split over ranks or micro-batches."""

    token_ids: Tensor
    lengths: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def rows(self, index: Tensor) -> Self:
        """The rows at `index` int64 [B], cut to their longest."""
        longest = int(self.lengths[index].max()) if len(index) else 1
        cut = {}
        for item in fields(self):
            value = getattr(self, item.name)[index]
            cut[item.name] = value[:, :longest] if value.ndim == 2 else value
        return replace(self, **cut)


@dataclass(frozen=True, slots=True)
class RolloutBatch(Rows):
    """Scored samples. `rollout_logprobs` float32 [N, T]; `rewards`, `staleness` [N]; `group_index` int64 [N].

    `correct` bool [N]: the unshaped task metric reached `rewards.correct_at`.
    """

    rollout_logprobs: Tensor
    rewards: Tensor
    correct: Tensor
    group_index: Tensor
    staleness: Tensor


@dataclass(frozen=True, slots=True)
class AnnotatedBatch(RolloutBatch):
    """`proximal_logprobs` float32 [N, T]: the learner's recomputation with the weights at the start of the update.

    `reference_logprobs` float32 [N, T]: of the weights at the start of the stage.
    """

    proximal_logprobs: Tensor
    reference_logprobs: Tensor


@dataclass(frozen=True, slots=True)
class TrainBatch(AnnotatedBatch):
    """One optimiser step. `advantages` float32 [N]; `token_weights` float32 [N, T], see `rlhf.losses.reduce`."""

    advantages: Tensor
    token_weights: Tensor


@dataclass(frozen=True, slots=True)
class SupervisedBatch(Rows):
    """One optimiser step of supervised learning. `token_weights` float32 [N, T]."""

    token_weights: Tensor


@dataclass(frozen=True, slots=True)
class PreferenceBatch(Rows):
    """One optimiser step over stored completions. `advantages` float32 [N]; `token_weights` float32 [N, T].

    `reference_logprobs` float32 [N, T]: of the weights at the start of the stage.
    """

    advantages: Tensor
    reference_logprobs: Tensor
    token_weights: Tensor


@dataclass(frozen=True, slots=True)
class PairBatch(PreferenceBatch):
    """Preference pairs: rows 2k and 2k + 1 are the chosen (advantage 1) and the rejected (-1) completion of a pair."""

    rows_per_unit: ClassVar[int] = 2


P = TypeVar("P", bound=PreferenceBatch)

Batch = TrainBatch | SupervisedBatch | PreferenceBatch
"""What a learner can make an optimiser step on."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one optimiser step did. `loss` and `grad_norm` (before clipping) are of the global batch."""

    loss: float
    grad_norm: float
    learning_rate: float
    trained_tokens: int
    metrics: Mapping[str, float]


def pad(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """[N] arrays of length T_i -> tensor [N, max T_i], zeros on the right."""
    out = torch.zeros(len(arrays), max(len(a) for a in arrays), dtype=dtype)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = torch.tensor(array, dtype=dtype)  # copies: arrays from Ray are read-only
    return out


def rollout_batch(groups: Sequence[ScoredGroup], version: int, correct_at: float) -> RolloutBatch:
    """The samples of `groups` that have a reward, as one batch; `version` is the learner's weight version now.

    A sample is correct when its task value is at least `correct_at`.
    """
    pairs = [(number, sample, value) for number, group in enumerate(groups) for sample, value in group.valued]
    samples = [sample for _, sample, _ in pairs]
    return RolloutBatch(
        token_ids=pad([s.token_ids for s in samples], torch.int64),
        lengths=torch.tensor([len(s.token_ids) for s in samples]),
        loss_mask=pad([s.loss_mask for s in samples], torch.bool),
        rollout_logprobs=pad([s.rollout_logprobs for s in samples], torch.float32),
        rewards=torch.tensor([value.value for _, _, value in pairs], dtype=torch.float32),
        correct=torch.tensor([value.task >= correct_at for _, _, value in pairs]),
        group_index=torch.tensor([number for number, _, _ in pairs]),
        staleness=torch.tensor([version - s.first_version for s in samples]),
    )


def annotated(
    batch: RolloutBatch, proximal_logprobs: Tensor, reference_logprobs: Tensor | None = None
) -> AnnotatedBatch:
    """The batch with the learner's log-probs; without reference ones where the algorithm needs none."""
    reference = no_reference(batch) if reference_logprobs is None else reference_logprobs
    return AnnotatedBatch(**_fields(batch), proximal_logprobs=proximal_logprobs, reference_logprobs=reference)


def no_reference(batch: Rows) -> Tensor:
    """[N, 0]: what stands for reference log-probs where there are none."""
    return torch.zeros(len(batch), 0)


def train_batch(batch: AnnotatedBatch, advantages: Tensor, token_weights: Tensor) -> TrainBatch:
    return TrainBatch(**_fields(batch), advantages=advantages, token_weights=token_weights)


def completion_rows(completions: Sequence[TokenizedExample]) -> Rows:
    """Stored completions as rows, in their order."""
    return Rows(
        token_ids=pad([c.token_ids for c in completions], torch.int64),
        lengths=torch.tensor([len(c.token_ids) for c in completions]),
        loss_mask=pad([c.loss_mask for c in completions], torch.bool),
    )


def preference_rows(units: Sequence[PreferenceUnit]) -> Rows:
    """All completions of pairs (chosen, rejected) or groups as rows, unit after unit."""
    return completion_rows([completion for unit in units for completion in unit.completions])


def supervised_batch(examples: Sequence[TokenizedExample], weigh: Weigh) -> SupervisedBatch:
    """Examples as one optimiser step."""
    rows = completion_rows(examples)
    return SupervisedBatch(**_fields(rows), token_weights=weigh(rows.loss_mask))


def pair_batch(pairs: Sequence[PreferencePair], weigh: Weigh) -> PairBatch:
    """Pairs as one optimiser step, without reference log-probs yet; see `with_reference`."""
    rows = preference_rows(pairs)
    return PairBatch(
        **_fields(rows),
        advantages=torch.tensor([1.0, -1.0]).repeat(len(pairs)),
        reference_logprobs=no_reference(rows),
        token_weights=weigh(rows.loss_mask),
    )


def group_batch(
    groups: Sequence[PreferenceGroup], advantages_of: Callable[[Tensor, Tensor], Tensor], weigh: Weigh
) -> PreferenceBatch:
    """Groups as one optimiser step, without reference log-probs yet; each group counts alike, whatever its size.

    `advantages_of(rewards [N], group_index [N]) -> [N]`, in float64.
    """
    rows = preference_rows(groups)
    sizes = torch.tensor([len(group.completions) for group in groups])
    index = torch.arange(len(groups)).repeat_interleave(sizes)
    rewards = torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float64)
    weights = weigh(rows.loss_mask)
    share = (len(rows) / (len(groups) * sizes.to(weights.dtype)))[index]  # exactly 1 where all have one size
    return PreferenceBatch(
        **_fields(rows),
        advantages=advantages_of(rewards, index).to(torch.float32),
        reference_logprobs=no_reference(rows),
        token_weights=weights * share[:, None],
    )


def with_reference(batch: P, reference_logprobs: Tensor) -> P:
    """The batch with the reference's log-probs [N, T' >= T] of its rows, cut to its width."""
    rows, width = batch.token_ids.shape
    assert reference_logprobs.shape[0] == rows and reference_logprobs.shape[1] >= width
    return replace(batch, reference_logprobs=reference_logprobs[:, :width])


def _fields(batch: Rows) -> dict[str, Tensor]:
    return {item.name: getattr(batch, item.name) for item in fields(batch)}
