"""AGAPO with an importance weight, as K-EXAONE trains."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.algorithms.agapo import GlobalAdvantages
from rlhf.algorithms.base import About, TokenLoss
from rlhf.algorithms.registry import register
from rlhf.batches import TrainBatch
from rlhf.losses.policy import truncated_policy_gradient
from rlhf.losses.reduce import Reduction
from rlhf.selection import GroupFilter


@register("agapo_offpolicy")
class AgapoOffPolicy(GlobalAdvantages):
    """`J = (1/N) sum_i (1/T_i) sum_t sg(min(rho_t, ratio_cap)) A_i log pi_theta(o_t)`, `rho = pi_theta / pi_rollout`.

    The weight holds both the updates since sampling and the gap between engine and learner. Zero-variance groups are
    dropped before the statistics, all-incorrect ones too. No KL.
    """

    about: ClassVar[About] = About(
        title="AGAPO, off-policy (K-EXAONE)",
        formula="J = (1/N) sum_i (1/T_i) sum_t sg(min(rho_t, ratio_cap)) A_i log pi_theta(o_t)\n"
        "rho_t = pi_theta / pi_rollout,  A_i as in AGAPO, after the zero-variance groups are dropped",
        source="K-EXAONE, arXiv 2601.01739, sec. 3.4",
        deviations=("The bound is not published; others use 4 to 8, here ratio_cap = 5.",),
        metrics={
            "policy/ratio": "here pi_theta / pi_rollout",
            "policy/clip_fraction": "share of tokens whose weight was cut; they keep a gradient",
        },
    )
    has_policy_ratio: ClassVar[bool] = False
    own_correction: ClassVar[bool] = True

    reduction: Reduction = "sequence_mean"
    group_filter: GroupFilter = "zero_variance"
    ratio_cap: Annotated[float, Field(ge=1.0, description="the weight is cut here; unpublished, others 4 to 8")] = 5.0

    def policy_loss(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> TokenLoss:
        ratio = (logprobs.detach() - batch.rollout_logprobs).exp()
        return TokenLoss(
            truncated_policy_gradient(logprobs, batch.rollout_logprobs, advantages, cap=self.ratio_cap),
            {"policy/ratio": ratio, "policy/clip_fraction": (ratio > self.ratio_cap).to(ratio.dtype)},
        )
