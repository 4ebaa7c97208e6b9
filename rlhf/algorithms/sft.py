"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rlhf.algorithms.base import About, Algorithm, Needs, TokenLoss
from rlhf.algorithms.registry import register
from rlhf.batches import Rows
from rlhf.losses.reduce import Reduction


@register("sft")
class Sft(Algorithm):
    """`L = -(1/L) sum_t log pi(o_t | .)` over the completion tokens of the batch, each token with the same weight."""

    about: ClassVar[About] = About(
        title="Supervised fine-tuning",
        formula="L = -(1/L) sum_i sum_t log pi(o_t | .) over the L completion tokens of the batch",
        source="EXAONE 4.0, arXiv 2507.11407 (unified SFT, then a round on reasoning data)",
    )

    reduction: Reduction = "token_mean"

    @property
    def needs(self) -> Needs:
        return Needs(data="demonstrations")

    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        return TokenLoss(-logprobs)
