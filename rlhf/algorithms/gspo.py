"""GSPO: one ratio and one clip for a whole sequence."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import group_zscore
from rlhf.algorithms.base import About, TokenLoss
from rlhf.algorithms.grpo import CLIP_METRICS, StdDdof, StdEps
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples, TrainBatch
from rlhf.losses.policy import clipped_ratio, clipped_sequence_surrogate, per_token, sequence_ratio
from rlhf.losses.reduce import Reduction


@register("gspo")
class Gspo(OnlineAlgorithm):
    """`J = (1/N) sum_i min(s_i A_i, clip(s_i) A_i)`, `s_i = exp(mean_t log(pi_theta / pi_prox))`.

    The value of a sequence stands on each of its tokens, so that the sequence mean gives it back. Degenerate: equal
    rewards give zero advantage.
    """

    about: ClassVar[About] = About(
        title="GSPO",
        formula="J = (1/N) sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)\n"
        "s_i = exp((1/T_i) sum_t log(pi_theta / pi_prox)),  A_i = (r_i - mean of its group) / (std + std_eps)",
        source="GSPO, arXiv 2507.18071",
        metrics=CLIP_METRICS,
    )
    token_level: ClassVar[bool] = False

    reduction: Reduction = "sequence_mean"
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0, description="epsilon below 1 (GSPO: 3e-4)")] = 3e-4
    clip_high: Annotated[float, Field(gt=0.0, description="epsilon above 1 (GSPO: 4e-4)")] = 4e-4
    std_eps: StdEps = 1e-6
    std_ddof: StdDdof = 0

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        return group_zscore(rewards, batch.group_index, eps=self.std_eps, ddof=self.std_ddof)

    def policy_loss(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> TokenLoss:
        ratio = sequence_ratio(logprobs, batch.proximal_logprobs, batch.loss_mask, mean=True)
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        loss = clipped_sequence_surrogate(ratio, advantages, **clip)
        cut = clipped_ratio(ratio.detach(), advantages, **clip)
        return TokenLoss(
            per_token(loss, logprobs),
            {"policy/ratio": per_token(ratio.detach(), logprobs), "policy/clip_fraction": per_token(cut, logprobs)},
        )
