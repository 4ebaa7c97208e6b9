"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rlhf.algorithms.base import Algorithm, Needs, TokenLoss
from rlhf.algorithms.registry import register
from rlhf.batches import Rows
from rlhf.losses.reduce import ReductionByLength


@register("sft")
class Sft(Algorithm):
    """`L = -(1/L) sum_t log pi(o_t | .)` over the completion tokens of the batch, each token with the same weight."""

    needs: ClassVar[Needs] = Needs()
    reduction: ReductionByLength = "token_mean"

    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        return TokenLoss(-logprobs)
