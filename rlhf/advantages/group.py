"""Advantages relative to the other samples of the same prompt.

Everywhere `rewards` is float [N] and `group_index` int64 [N], equal for samples of one prompt and otherwise arbitrary;
the result is [N], without gradient. A group may have any size: lost members only make it smaller. Equal rewards in a
group, and so a group of one, give exactly zero. Arrays of unequal shape raise ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_mean_centred(rewards: Tensor, group_index: Tensor) -> Tensor:
    """`A_i = r_i - mean(r of i's group)`. Source: Dr. GRPO (2503.20783), EXAONE 4.5."""
    rewards, index = rewards.detach(), _dense(rewards, group_index)
    centred = rewards - _sum_in_group(rewards, index) / _size(rewards, index)
    # The mean of n equal floats can differ from them in the last bit.
    low, high = _extremes(rewards, index)
    return centred.masked_fill(low == high, 0.0)


def group_zscore(rewards: Tensor, group_index: Tensor, *, eps: float = 1e-6, ddof: int = 0) -> Tensor:
    """`A_i = (r_i - mean) / (std + eps)` of i's group, `std^2 = sum (r - mean)^2 / (G - ddof)`.

    Source: GRPO (2402.03300), which leaves `eps` and `ddof` open; every library has its own.
    """
    index, centred = _dense(rewards, group_index), group_mean_centred(rewards, group_index)
    degrees = (_size(centred, index) - ddof).clamp(min=1.0)
    scaled = centred / ((_sum_in_group(centred.square(), index) / degrees).sqrt() + eps)
    # With eps 0 a group of equal rewards would be 0 / 0.
    return torch.where(centred == 0, centred, scaled)


def leave_one_out(rewards: Tensor, group_index: Tensor) -> Tensor:
    """`A_i = r_i - mean(r of the others in i's group)`, which is `G / (G - 1)` times `group_mean_centred`.

    Source: RLOO (2402.14740), the first stage of AGAPO (2507.11407).
    """
    size = _size(rewards.detach(), _dense(rewards, group_index))
    return group_mean_centred(rewards, group_index) * size / (size - 1.0).clamp(min=1.0)


def group_min_max(rewards: Tensor, group_index: Tensor) -> Tensor:
    """`A_i = 2 (r_i - min) / (max - min) - 1` of i's group: the best has exactly 1, the worst exactly -1.

    Source: GROUPER (2601.01739), whose z-score beforehand changes nothing here.
    """
    rewards, index = rewards.detach(), _dense(rewards, group_index)
    low, high = _extremes(rewards, index)
    return (2.0 * (rewards - low) / (high - low) - 1.0).masked_fill(low == high, 0.0)


def _dense(rewards: Tensor, group_index: Tensor) -> Tensor:
    """`group_index` renumbered from 0: int64 [N], every value below N."""
    if rewards.ndim != 1 or rewards.shape != group_index.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_index {tuple(group_index.shape)} must both be [N]")
    return torch.unique(group_index, return_inverse=True)[1]


def _sum_in_group(values: Tensor, index: Tensor) -> Tensor:
    """[N]: the sum over each sample's group."""
    return torch.zeros_like(values).index_add_(0, index, values)[index]


def _size(like: Tensor, index: Tensor) -> Tensor:
    """[N]: how many samples each sample's group has, in the dtype of `like`."""
    return _sum_in_group(torch.ones_like(like), index)


def _extremes(rewards: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """[N] each: the least and the greatest reward of each sample's group. NaN if the group holds one."""
    low = torch.full_like(rewards, float("inf")).scatter_reduce_(0, index, rewards, "amin")
    high = torch.full_like(rewards, float("-inf")).scatter_reduce_(0, index, rewards, "amax")
    return low[index], high[index]
