"""CISPO: REINFORCE with a clipped importance weight, in which every token keeps its gradient."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import group_zscore
from rlhf.algorithms.base import About, TokenLoss
from rlhf.algorithms.grpo import StdDdof, StdEps
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples, TrainBatch
from rlhf.losses.policy import cispo
from rlhf.losses.reduce import Reduction


@register("cispo")
class Cispo(OnlineAlgorithm):
    """`J = (1/L) sum_i sum_t sg(min(ratio_t, 1 + ratio_high)) A_i log pi_theta(o_t)`, `ratio = pi_theta / pi_prox`.

    L is the number of all completion tokens. At ratio 1 it is REINFORCE. Degenerate: equal rewards give zero advantage.
    """

    about: ClassVar[About] = About(
        title="CISPO",
        formula="J = (1/L) sum_i sum_t sg(min(ratio_t, 1 + ratio_high)) A_i log pi_theta(o_t)\n"
        "ratio_t = pi_theta / pi_prox,  A_i = (r_i - mean of its group) / (std of its group + std_eps)",
        source="MiniMax-M1, arXiv 2506.13585 (upper bound only)",
        deviations=("The upper bound is not published; ratio_high = 4 cuts ratios at 5.",),
        metrics={"policy/clip_fraction": "share of tokens whose weight was cut; they keep a gradient"},
    )

    reduction: Reduction = "token_mean"
    ratio_high: Annotated[float, Field(gt=0.0, description="the weight is cut at 1 + ratio_high; unpublished")] = 4.0
    std_eps: StdEps = 1e-6
    std_ddof: StdDdof = 0

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        return group_zscore(rewards, batch.group_index, eps=self.std_eps, ddof=self.std_ddof)

    def policy_loss(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> TokenLoss:
        ratio = (logprobs.detach() - batch.proximal_logprobs).exp()
        return TokenLoss(
            cispo(logprobs, batch.proximal_logprobs, advantages, ratio_high=self.ratio_high),
            {"policy/ratio": ratio, "policy/clip_fraction": (ratio > 1.0 + self.ratio_high).to(ratio.dtype)},
        )
