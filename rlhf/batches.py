"""The records that train: padded torch tensors, one type for each stage.

    RolloutBatch -> AnnotatedBatch -> TrainBatch -> UpdateReport

`N` rows of `T` tokens, padded on the right; `lengths` [N] says where padding starts (never the pad token's id: the
policy can sample it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rlhf.samples import ScoredGroup, TokenizedExample


@dataclass(frozen=True, slots=True)
class Rows:
    """What every batch has: `token_ids` int64 [N, T], `lengths` int64 [N], `loss_mask` bool [N, T]."""

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
    """Scored samples. `rollout_logprobs` float32 [N, T]; `rewards`, `staleness` [N]; `group_index` int64 [N]."""

    rollout_logprobs: Tensor
    rewards: Tensor
    group_index: Tensor
    staleness: Tensor


@dataclass(frozen=True, slots=True)
class AnnotatedBatch(RolloutBatch):
    """`proximal_logprobs` float32 [N, T]: the learner's recomputation with the weights at the start of the update."""

    proximal_logprobs: Tensor


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


def rollout_batch(groups: Sequence[ScoredGroup], version: int) -> RolloutBatch:
    """The samples of `groups` that have a reward, as one batch; `version` is the learner's weight version now."""
    pairs = [(number, sample, value) for number, group in enumerate(groups) for sample, value in group.valued]
    samples = [sample for _, sample, _ in pairs]
    return RolloutBatch(
        token_ids=pad([s.token_ids for s in samples], torch.int64),
        lengths=torch.tensor([len(s.token_ids) for s in samples]),
        loss_mask=pad([s.loss_mask for s in samples], torch.bool),
        rollout_logprobs=pad([s.rollout_logprobs for s in samples], torch.float32),
        rewards=torch.tensor([value.value for _, _, value in pairs], dtype=torch.float32),
        group_index=torch.tensor([number for number, _, _ in pairs]),
        staleness=torch.tensor([version - s.first_version for s in samples]),
    )


def annotated(batch: RolloutBatch, proximal_logprobs: Tensor) -> AnnotatedBatch:
    return AnnotatedBatch(**_fields(batch), proximal_logprobs=proximal_logprobs)


def train_batch(batch: AnnotatedBatch, advantages: Tensor, token_weights: Tensor) -> TrainBatch:
    return TrainBatch(**_fields(batch), advantages=advantages, token_weights=token_weights)


def supervised_batch(examples: Sequence[TokenizedExample], weigh: Callable[[Tensor], Tensor]) -> SupervisedBatch:
    """Examples as one batch; `weigh(loss_mask) -> token_weights` is the algorithm's reduction."""
    loss_mask = pad([e.loss_mask for e in examples], torch.bool)
    return SupervisedBatch(
        token_ids=pad([e.token_ids for e in examples], torch.int64),
        lengths=torch.tensor([len(e.token_ids) for e in examples]),
        loss_mask=loss_mask,
        token_weights=weigh(loss_mask),
    )


def _fields(batch: Rows) -> dict[str, Tensor]:
    return {item.name: getattr(batch, item.name) for item in fields(batch)}
