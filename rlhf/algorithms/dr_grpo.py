"""Dr. GRPO: GRPO without the two normalisations that bias it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import group_mean_centred
from rlhf.algorithms.base import About
from rlhf.algorithms.grpo import CLIP_METRICS, ClippedPolicy
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples
from rlhf.losses.reduce import Reduction


@register("dr_grpo")
class DrGrpo(ClippedPolicy):
    """`J = (1/N) sum_i (1/C) sum_t min(ratio_t A_i, clip(ratio_t) A_i)`, `A = r - group mean`, C a constant.

    Degenerate: equal rewards give zero advantage.
    """

    about: ClassVar[About] = About(
        title="Dr. GRPO",
        formula="J = (1/N) sum_i (1/C) sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)\n"
        "A_i = r_i - mean of its group,  C = fixed_length",
        source="Dr. GRPO, arXiv 2503.20783 (no standard deviation, no division by the length, no KL)",
        deviations=("C is the longest completion of a run, as in the paper; conf/algorithm/dr_grpo.yaml sets it.",),
        metrics=CLIP_METRICS,
    )

    reduction: Reduction = "fixed_length"
    fixed_length: Annotated[int, Field(ge=1)] | None = Field(
        default=1024, description="C, in tokens; conf/algorithm/dr_grpo.yaml: rollouts.max_completion_tokens"
    )

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        return group_mean_centred(rewards, batch.group_index)
