"""Normalisation over all samples of a step, whatever their group."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.advantages.group import group_zscore


def global_zscore(values: Tensor, *, eps: float = 1e-6, ddof: int = 0) -> Tensor:
    """`(v - mean) / (std + eps)` over all of `values` [N], each sample counted once whatever its length.

    Returns [N], without gradient. Equal values give exactly zero. `ddof` 0 is the population standard deviation.
    """
    return group_zscore(values, torch.zeros_like(values, dtype=torch.int64), eps=eps, ddof=ddof)
