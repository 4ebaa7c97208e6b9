"""Advantages of AGAPO, with what may be done about prompts that nobody solved."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf.advantages.group import group_mean_centred, leave_one_out
from rlhf.advantages.normalise import global_zscore

AllIncorrect = Literal["literal", "batch_baseline", "constant"]


def agapo_advantages(
    rewards: Tensor,
    group_index: Tensor,
    correct: Tensor,
    *,
    all_incorrect: AllIncorrect = "literal",
    constant: float = 0.0,
    eps: float = 1e-6,
    ddof: int = 0,
) -> Tensor:
    """Leave-one-out within each group, then a z-score over all samples: eq. 2 of EXAONE 4.0 (2507.11407).

    `rewards` float [N]; `group_index` int64 [N]; `correct` bool [N]. Returns [N], without gradient. A group is
    all-incorrect when none of its samples is `correct`. The paper wants those groups to be a little negative, but its
    formula gives them exactly 0 when their rewards are equal. `literal` is the formula. `batch_baseline` takes the mean
    reward of all samples as their baseline before the z-score, which then also lifts the other groups. `constant`
    subtracts `constant` from them after the z-score.
    """
    local = leave_one_out(rewards, group_index)
    unsolved = _all_incorrect(group_index, correct)
    if all_incorrect == "batch_baseline":
        against_batch = group_mean_centred(rewards, torch.zeros_like(group_index))
        return global_zscore(torch.where(unsolved, against_batch, local), eps=eps, ddof=ddof)
    # Leave-one-out sums to zero in every group, so the mean taken off is rounding only and must not move a zero.
    scaled = global_zscore(local, eps=eps, ddof=ddof).masked_fill(local == 0, 0.0)
    return torch.where(unsolved, scaled - constant, scaled) if all_incorrect == "constant" else scaled


def _all_incorrect(group_index: Tensor, correct: Tensor) -> Tensor:
    """Bool [N]: no sample of this one's group is correct."""
    if correct.shape != group_index.shape:
        raise ValueError(f"correct {tuple(correct.shape)} and group_index {tuple(group_index.shape)} must both be [N]")
    return ~torch.isin(group_index, group_index[correct.bool()])
