"""RLOO: REINFORCE on whole sequences with a leave-one-out baseline."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import leave_one_out
from rlhf.algorithms.base import About, TokenLoss
from rlhf.algorithms.grpo import CLIP_METRICS
from rlhf.algorithms.kl import Kl
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples, TrainBatch
from rlhf.losses.policy import clipped_ratio, clipped_sequence_surrogate, per_token, sequence_ratio
from rlhf.losses.reduce import Reduction
from rlhf.losses.sequence import spread_over_tokens


@register("rloo")
class Rloo(OnlineAlgorithm):
    """`J = (1/N) sum_i min(s_i A_i, clip(s_i) A_i)`, `s_i = exp(sum_t log(pi_theta / pi_prox))`, `A` leave-one-out.

    At ratio 1 the gradient is `A_i grad log pi(o_i)`, with the token sum: a sequence is one action. The value of a
    sequence is shared out over its tokens, so that `sequence_sum` gives it back. Degenerate: equal rewards give zero
    advantage. The advantage is the mean-centred reward times G / (G - 1).
    """

    about: ClassVar[About] = About(
        title="RLOO",
        formula="J = (1/N) sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)\n"
        "s_i = exp(sum_t log(pi_theta / pi_prox)),  A_i = r_i - mean of the other rewards of its group\n"
        "r_i = reward - kl.coefficient * sum_t log(pi_prox / pi_ref)",
        source="RLOO, arXiv 2402.14740",
        deviations=(
            "The paper makes one update on fresh samples, where s = 1. The clipped ratio keeps further updates sound.",
            "kl.coefficient is 0 unless set; its estimator is k1 in the reward, as in the paper.",
        ),
        metrics=CLIP_METRICS,
    )
    token_level: ClassVar[bool] = False

    reduction: Reduction = "sequence_sum"
    kl: Kl = Field(default=Kl(estimator="k1", placement="reward"), description="k1 in the reward (RLOO)")
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0, description="epsilon below 1 (PPO 1707.06347)")] = 0.2
    clip_high: Annotated[float, Field(gt=0.0, description="epsilon above 1")] = 0.2

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        return leave_one_out(rewards, batch.group_index)

    def policy_loss(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> TokenLoss:
        ratio = sequence_ratio(logprobs, batch.proximal_logprobs, batch.loss_mask, mean=False)
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        loss = clipped_sequence_surrogate(ratio, advantages, **clip)
        cut = clipped_ratio(ratio.detach(), advantages, **clip)
        return TokenLoss(
            spread_over_tokens(loss, batch.loss_mask),
            {"policy/ratio": per_token(ratio.detach(), logprobs), "policy/clip_fraction": per_token(cut, logprobs)},
        )
