"""Advantages relative to the other samples of the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def group_mean_centred(
    rewards: Tensor, group_index: Tensor, *, scale_by_std: bool = False, eps: float = 1e-6
) -> Tensor:
    """`A_i = r_i - mean(r of i's group)`, divided by `std + eps` of the group when `scale_by_std`.

    `rewards` float [N]; `group_index` int64 [N], equal for samples of one prompt. Returns [N], without gradient.
    Source: GRPO (2402.03300) with the standard deviation, Dr. GRPO (2503.20783) and EXAONE 4.5 without.
    The standard deviation is the population one (ddof 0). Equal rewards give exactly zero, as does a group of one.
    """
    if rewards.ndim != 1 or rewards.shape != group_index.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_index {tuple(group_index.shape)} must both be [N]")
    rewards = rewards.detach()
    _, index = torch.unique(group_index, return_inverse=True)
    count = torch.bincount(index).to(rewards.dtype)

    def mean_of_group(values: Tensor) -> Tensor:
        return (torch.zeros_like(count).index_add_(0, index, values) / count)[index]

    centred = rewards - mean_of_group(rewards)
    # The mean of n equal floats can differ from them in the last bit; those groups must be exactly zero.
    equal = _all_equal_in_group(rewards, index, count.numel())
    centred = torch.where(equal, torch.zeros_like(centred), centred)
    if not scale_by_std:
        return centred
    return centred / (mean_of_group(centred.square()).sqrt() + eps)


def _all_equal_in_group(rewards: Tensor, index: Tensor, groups: int) -> Tensor:
    low = rewards.new_full((groups,), float("inf")).scatter_reduce_(0, index, rewards, "amin")
    high = rewards.new_full((groups,), float("-inf")).scatter_reduce_(0, index, rewards, "amax")
    return (low == high)[index]
