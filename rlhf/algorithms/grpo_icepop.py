"""GRPO with IcePop, as EXAONE 4.5 trains."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import group_mean_centred
from rlhf.algorithms.base import About
from rlhf.algorithms.correction import Correction, IcePop
from rlhf.algorithms.grpo import CLIP_METRICS, ClippedPolicy
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples
from rlhf.losses.reduce import Reduction
from rlhf.selection import GroupFilter


@register("grpo_icepop")
class GrpoIcePop(ClippedPolicy):
    """`J = (1/N) sum_i (1/T_i) sum_t M(k_t) min(ratio_t A_i, clip(ratio_t) A_i)`, `k = pi_prox / pi_rollout`.

    `A = r - group mean`. `ratio = pi_theta / pi_prox` is 1 when a step makes one update. Degenerate: equal rewards give
    zero advantage, so such groups are filtered and refilled before the update.
    """

    about: ClassVar[About] = About(
        title="GRPO + IcePop (EXAONE 4.5)",
        formula="J = (1/N) sum_i (1/T_i) sum_t M(k_t) min(ratio_t A_i, clip(ratio_t) A_i)\n"
        "A_i = r_i - mean of its group,  k_t = pi_prox / pi_rollout,  M(k) = k if low <= k <= high else 0",
        source="EXAONE 4.5 (advantage without std, zero-variance groups dropped, no KL); IcePop, arXiv 2510.18855",
        deviations=("Clip bounds are not published; here PPO's 0.2 on both sides.",),
        metrics=CLIP_METRICS,
    )

    reduction: Reduction = "sequence_mean"
    correction: Correction = Field(default=IcePop(kind="icepop"), description="IcePop: alpha 0.5, beta 5 in the paper")
    group_filter: GroupFilter = "zero_variance"

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        return group_mean_centred(rewards, batch.group_index)
