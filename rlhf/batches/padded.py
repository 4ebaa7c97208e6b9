"""A micro-batch as formulas see it: padded per-token scalars, one type for each kind of training.

`B` sequences of up to `T` tokens, padded on the right; `lengths` [B] says where padding starts (never the pad token's
id: the policy can sample it). These tensors hold a few bytes a token; hidden states and attention are never padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.batches.ragged import (
    PairSequences,
    PreferenceSequences,
    Sequences,
    SupervisedSequences,
    TrainSequences,
)


@dataclass(frozen=True, slots=True)
class Rows:
    """`token_ids` int64 [B, T], `lengths` int64 [B], `loss_mask` bool [B, T], `token_weights` [B, T].

    The loss is the sum of `token_weights` times the token losses: see `rlhf.losses.reduce`.
    """

    token_ids: Tensor
    lengths: Tensor
    loss_mask: Tensor
    token_weights: Tensor

    def __len__(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True, slots=True)
class TrainBatch(Rows):
    """Scored samples. All log-probs are [B, T], `advantages` and `staleness` [B].

    `proximal_logprobs` are the learner's with the weights at the start of the step, `reference_logprobs` those of the
    weights at the start of the stage, or [B, 0] where the algorithm needs none: to use them then is a shape error.
    """

    rollout_logprobs: Tensor
    proximal_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    staleness: Tensor


@dataclass(frozen=True, slots=True)
class SupervisedBatch(Rows):
    """Demonstrations."""


@dataclass(frozen=True, slots=True)
class PreferenceBatch(Rows):
    """Stored completions. `advantages` [B]; `reference_logprobs` [B, T] as in `TrainBatch`."""

    advantages: Tensor
    reference_logprobs: Tensor


@dataclass(frozen=True, slots=True)
class PairBatch(PreferenceBatch):
    """Preference pairs: rows 2k and 2k + 1 are the chosen (advantage 1) and the rejected (-1) completion of a pair."""


MicroBatch = TrainBatch | SupervisedBatch | PreferenceBatch
"""The micro-batches on which a token loss is computed."""


class Padder:
    """Moves arrays of one micro-batch to `device`, padded to [B, T]."""

    def __init__(self, sequences: Sequences, device: torch.device) -> None:
        self._device = device
        lengths = torch.from_numpy(sequences.lengths).to(device)
        width = int(sequences.lengths.max(initial=1))
        self.lengths = lengths
        self._present = torch.arange(width, device=device) < lengths[:, None]

    def tokens(self, values: np.ndarray | Tensor) -> Tensor:
        """[S] -> [B, T] with zeros as padding; an empty array becomes [B, 0]."""
        given = _on(values, self._device)
        if not len(given):
            return given.new_zeros(len(self.lengths), 0)
        return _scattered(given, self._present)

    def sequences(self, values: np.ndarray) -> Tensor:
        """[B] as a tensor."""
        return _on(values, self._device)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """`values` [M] on the M True places of `mask` [B, T] in row order, zero elsewhere; differentiable."""
    return _scattered(values, mask)


def padded(sequences: Sequences, logprobs: Tensor) -> Any:
    """The micro-batch that formulas see of `sequences`; `logprobs` [M] are the policy's of the trained tokens.

    Where `sequences` bring no proximal log-probs, this is the only update of its step: the policy still has the weights
    of its start, and the proximal log-probs are its own, detached.
    """
    padder = Padder(sequences, logprobs.device)
    mask = padder.tokens(sequences.loss_mask)
    return _padded(sequences, padder, mask, spread(logprobs.detach(), mask))


@singledispatch
def _padded(sequences: Sequences, padder: Padder, mask: Tensor, own_logprobs: Tensor) -> Any:
    raise TypeError(f"no loss trains on {type(sequences).__name__}")


@_padded.register
def _(sequences: TrainSequences, padder: Padder, mask: Tensor, own_logprobs: Tensor) -> TrainBatch:
    proximal = sequences.proximal_logprobs
    return TrainBatch(
        **_common(sequences, padder, mask),
        rollout_logprobs=padder.tokens(sequences.rollout_logprobs),
        proximal_logprobs=padder.tokens(proximal) if len(proximal) else own_logprobs,
        reference_logprobs=padder.tokens(sequences.reference_logprobs),
        advantages=padder.sequences(sequences.advantages),
        staleness=padder.sequences(sequences.staleness),
    )


@_padded.register
def _(sequences: SupervisedSequences, padder: Padder, mask: Tensor, own_logprobs: Tensor) -> SupervisedBatch:
    return SupervisedBatch(**_common(sequences, padder, mask))


@_padded.register
def _(sequences: PreferenceSequences, padder: Padder, mask: Tensor, own_logprobs: Tensor) -> PreferenceBatch:
    kind = PairBatch if isinstance(sequences, PairSequences) else PreferenceBatch
    return kind(
        **_common(sequences, padder, mask),
        advantages=padder.sequences(sequences.advantages),
        reference_logprobs=padder.tokens(sequences.reference_logprobs),
    )


def _common(
    sequences: TrainSequences | SupervisedSequences | PreferenceSequences, padder: Padder, mask: Tensor
) -> dict[str, Tensor]:
    weights = padder.sequences(sequences.weights)
    return {
        "token_ids": padder.tokens(sequences.token_ids).long(),
        "lengths": padder.lengths,
        "loss_mask": mask,
        "token_weights": mask * weights[:, None],
    }


def _on(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(device)
    # A copy: arrays out of Ray's object store are read-only, which torch does not allow.
    return torch.tensor(values, device=device)


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
