"""REWARD -> ADVANTAGE: pure functions of reward tensors."""

from rlhf.advantages.group import group_mean_centred

__all__ = ["group_mean_centred"]
