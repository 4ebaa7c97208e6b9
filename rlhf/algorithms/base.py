"""What an algorithm is: hyper-parameters, what it needs, advantages, an unreduced token loss and a reduction."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rlhf.batches import AnnotatedBatch, Rows
from rlhf.losses.reduce import Reduction, token_weights


class Needs(NamedTuple):
    """What a run must provide for an algorithm. The learner and the rules ask this, never the algorithm's name."""

    rollouts: bool = False
    group_baseline: bool = False
    proximal_logprobs: bool = False
    importance_correction: bool = False


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """`loss` [B, T], unreduced, with gradient; `metrics` name -> [B, T] without, averaged over the loss mask."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Algorithm(BaseModel):
    """Base of all algorithms. Fields are the hyper-parameters; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: ClassVar[Needs]
    reduction: Reduction
    filter_zero_variance: ClassVar[bool] = False

    @abstractmethod
    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        """Loss of every token from the policy's `logprobs` [B, T]. Gradient flows through `logprobs` only."""

    def advantages(self, batch: AnnotatedBatch) -> Tensor:
        """Advantages [N] of all samples of one rollout step."""
        raise TypeError(f"{type(self).__name__} trains without rewards and has no advantages")

    def token_weights(self, loss_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Reduction weights [N, T] of one optimiser step."""
        return token_weights(loss_mask, self.reduction, dtype=dtype)
