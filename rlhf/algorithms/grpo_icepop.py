"""GRPO with IcePop, as EXAONE 4.5 trains."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import group_mean_centred
from rlhf.algorithms.base import Algorithm, Needs, TokenLoss
from rlhf.algorithms.registry import register
from rlhf.batches import AnnotatedBatch, Rows, TrainBatch
from rlhf.losses.correction import icepop
from rlhf.losses.policy import clipped, clipped_surrogate
from rlhf.losses.reduce import ReductionByLength


@register("grpo_icepop")
class GrpoIcePop(Algorithm):
    """`J = (1/N) sum_i (1/T_i) sum_t M(k_t) min(ratio_t A_i, clip(ratio_t) A_i)`, `k = pi_prox / pi_rollout`.

    Sources: EXAONE 4.5 (advantage `r - group mean` without std, zero-variance groups dropped, no KL); IcePop
    2510.18855 for `M` (0.5 <= k <= 5). `ratio = pi_theta / pi_prox` is 1 when a step makes one update.
    Degenerate: equal rewards give zero advantage, so such groups are filtered and refilled before the update.
    """

    needs: ClassVar[Needs] = Needs(
        rollouts=True, group_baseline=True, proximal_logprobs=True, importance_correction=True
    )
    filter_zero_variance: ClassVar[bool] = True

    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: Annotated[float, Field(gt=0.0)] = 0.2
    icepop_low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    icepop_high: Annotated[float, Field(ge=1.0)] = 5.0
    scale_by_std: bool = False
    reduction: ReductionByLength = "sequence_mean"

    def advantages(self, batch: AnnotatedBatch) -> Tensor:
        return group_mean_centred(batch.rewards, batch.group_index, scale_by_std=self.scale_by_std)

    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        assert isinstance(batch, TrainBatch)
        proximal, advantages = batch.proximal_logprobs, batch.advantages
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        weights = icepop(proximal, batch.rollout_logprobs, low=self.icepop_low, high=self.icepop_high)
        loss = weights * clipped_surrogate(logprobs, proximal, advantages, **clip)
        return TokenLoss(
            loss,
            {
                "policy/ratio": (logprobs.detach() - proximal).exp(),
                "policy/clip_fraction": clipped(logprobs.detach(), proximal, advantages, **clip),
                "mismatch/masked_fraction": (weights == 0).to(logprobs.dtype),
            },
        )
