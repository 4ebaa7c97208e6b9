"""REWARD -> ADVANTAGE: pure functions of reward tensors."""

from rlhf.advantages.agapo import agapo_advantages
from rlhf.advantages.group import group_mean_centred, group_min_max, group_zscore, leave_one_out
from rlhf.advantages.normalise import global_zscore
from rlhf.advantages.shaping import soft_overlong_penalty

__all__ = [
    "agapo_advantages",
    "global_zscore",
    "group_mean_centred",
    "group_min_max",
    "group_zscore",
    "leave_one_out",
    "soft_overlong_penalty",
]
