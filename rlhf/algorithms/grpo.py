"""GRPO, and the token-wise clipped loss that several algorithms share."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import group_zscore
from rlhf.algorithms.base import About, TokenLoss
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples, TrainBatch
from rlhf.losses.policy import clipped, clipped_surrogate
from rlhf.losses.reduce import Reduction

StdEps = Annotated[float, Field(gt=0.0, description="added to the standard deviation; libraries use 1e-4 to 1e-9")]
StdDdof = Annotated[int, Field(ge=0, le=1, description="0 population, 1 sample standard deviation")]


CLIP_METRICS = {"policy/clip_fraction": "share of tokens whose gradient the clip cut"}


class ClippedPolicy(OnlineAlgorithm):
    """`-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)` with `ratio = pi_theta / pi_prox` of each token."""

    clip_low: Annotated[float, Field(gt=0.0, lt=1.0, description="epsilon below 1 (PPO 1707.06347)")] = 0.2
    clip_high: Annotated[float, Field(gt=0.0, description="epsilon above 1")] = 0.2

    def policy_loss(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> TokenLoss:
        proximal, clip = batch.proximal_logprobs, {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return TokenLoss(
            clipped_surrogate(logprobs, proximal, advantages, **clip),
            {
                "policy/ratio": (logprobs.detach() - proximal).exp(),
                "policy/clip_fraction": clipped(logprobs.detach(), proximal, advantages, **clip),
            },
        )


@register("grpo")
class Grpo(ClippedPolicy):
    """`J = (1/N) sum_i (1/T_i) sum_t min(ratio_t A_i, clip(ratio_t) A_i) - beta k3`, `A = (r - group mean) / std`.

    `ratio = pi_theta / pi_prox` is 1 when a step makes one update. Degenerate: equal rewards give zero advantage.
    """

    about: ClassVar[About] = About(
        title="GRPO",
        formula="J = (1/N) sum_i (1/T_i) sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i) - kl\n"
        "A_i = (r_i - mean of its group) / (std of its group + std_eps),  ratio_t = pi_theta / pi_prox",
        source="DeepSeekMath, arXiv 2402.03300",
        deviations=(
            "kl.coefficient is 0 unless set (the paper: 0.04, k3 in the loss): rewards are verified, not modelled.",
            "The paper does not say which standard deviation; here std_ddof = 0 and std_eps = 1e-6.",
        ),
        metrics=CLIP_METRICS,
    )

    reduction: Reduction = "sequence_mean"
    std_eps: StdEps = 1e-6
    std_ddof: StdDdof = 0

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        return group_zscore(rewards, batch.group_index, eps=self.std_eps, ddof=self.std_ddof)
