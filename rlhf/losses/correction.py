"""Weights that correct for the gap between the engine that sampled and the learner that trains."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def icepop(proximal_logprobs: Tensor, rollout_logprobs: Tensor, *, low: float, high: float) -> Tensor:
    """`M(k) = k if low <= k <= high else 0` with `k = exp(proximal - rollout)`, both from the same weights.

    All [B, T]. The result multiplies *and* masks the policy loss; it carries no gradient, and a masked token stays
    in the denominator of the mean. NaN stays NaN: a broken log-prob must stop the run, not count as masked.
    Source: IcePop (2510.18855); low 0.5, high 5 in the paper.
    """
    ratio = torch.exp(proximal_logprobs - rollout_logprobs)
    return torch.where((ratio < low) | (ratio > high), torch.zeros_like(ratio), ratio)
