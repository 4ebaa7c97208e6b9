"""DAPO: GRPO with a higher upper clip, a token mean, dynamic sampling and a penalty on overlong completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from rlhf.advantages import group_zscore, soft_overlong_penalty
from rlhf.algorithms.base import About
from rlhf.algorithms.grpo import CLIP_METRICS, ClippedPolicy, StdDdof, StdEps
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples
from rlhf.losses.reduce import Reduction
from rlhf.selection import GroupFilter


@register("dapo")
class Dapo(ClippedPolicy):
    """`J = (1/L) sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - 0.2, 1 + 0.28) A_i)`, `A = (r - group mean) / std`.

    L is the number of all completion tokens. Groups that are all correct or all wrong are dropped and refilled. With
    `overlong_max_tokens` the reward of a completion longer than that less `overlong_buffer_tokens` falls linearly by up
    to 1. With equal clips, the sequence mean and no filter it is GRPO.
    """

    about: ClassVar[About] = About(
        title="DAPO",
        formula="J = (1/L) sum_i sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i)\n"
        "A_i = (r_i - mean of its group) / (std of its group + std_eps),  only groups with 0 < correct < G\n"
        "r_i = reward + penalty(T_i): 0 up to Lmax - Lc, linear to -1 at Lmax, -1 beyond",
        source="DAPO, arXiv 2503.14476",
        deviations=(
            "Lmax and Lc are overlong_max_tokens and overlong_buffer_tokens; conf/algorithm/dapo.yaml takes Lmax from "
            "rollouts.max_completion_tokens. The paper has 20480 and 4096, so by default Lc is a fifth of Lmax.",
        ),
        metrics=CLIP_METRICS,
    )

    reduction: Reduction = "token_mean"
    clip_high: Annotated[float, Field(gt=0.0, description="epsilon above 1 (DAPO: 0.28)")] = 0.28
    group_filter: GroupFilter = "not_mixed"
    std_eps: StdEps = 1e-6
    std_ddof: StdDdof = 0
    overlong_max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Lmax of the soft overlong penalty, in completion tokens; null: no penalty"
    )
    overlong_buffer_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Lc; null: a fifth of Lmax, as in the paper"
    )

    @model_validator(mode="after")
    def _buffer_fits(self) -> Dapo:
        if self.overlong_buffer_tokens is not None:
            if self.overlong_max_tokens is None:
                raise ValueError("overlong_buffer_tokens needs overlong_max_tokens. There is no penalty without it")
            if self.overlong_buffer_tokens > self.overlong_max_tokens:
                raise ValueError(
                    f"overlong_buffer_tokens must be at most overlong_max_tokens = {self.overlong_max_tokens}. The "
                    "penalty begins that many tokens before the limit"
                )
        return self

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        if self.overlong_max_tokens is not None:
            buffer = self.overlong_buffer_tokens or max(1, self.overlong_max_tokens // 5)
            lengths = batch.completion_tokens
            rewards = rewards + soft_overlong_penalty(
                lengths, max_tokens=self.overlong_max_tokens, buffer_tokens=buffer
            ).to(rewards.dtype)
        return group_zscore(rewards, batch.group_index, eps=self.std_eps, ddof=self.std_ddof)
