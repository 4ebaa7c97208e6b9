"""Weights that correct for the gap between the engine that sampled and the learner that trains.

`k = exp(proximal - rollout)` of each token, where both log-probs [B, T] are of the same weights. Every function returns
weights [B, T] without gradient, for the policy loss alone; a token of weight 0 stays in the denominator of the mean.
Those that look at a whole row take `mask` bool [B, T] and give all tokens of the row one weight; a row without masked
tokens counts as k = 1. NaN on the mask stays NaN: a broken log-prob must stop the run, not count as masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.losses.policy import per_token
from rlhf.losses.sequence import masked_mean, masked_sum


@torch.no_grad()
def icepop(proximal_logprobs: Tensor, rollout_logprobs: Tensor, *, low: float, high: float) -> Tensor:
    """`k` where `low <= k <= high`, else 0: it multiplies *and* masks. Source: IcePop (2510.18855), there 0.5 and 5."""
    ratio = torch.exp(proximal_logprobs - rollout_logprobs)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@torch.no_grad()
def tis_token(proximal_logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float) -> Tensor:
    """`min(k, cap)`: truncated importance sampling, token by token."""
    return torch.exp(proximal_logprobs - rollout_logprobs).clamp(max=cap)


@torch.no_grad()
def tis_sequence(proximal_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """`min(rho, cap)` with `rho` the product of k over the row."""
    ratio = torch.exp(masked_sum(proximal_logprobs - rollout_logprobs, mask))
    return per_token(ratio.clamp(max=cap), mask)


@torch.no_grad()
def sequence_mask(proximal_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """`rho` where `rho <= cap`, else 0, with `rho` the product of k over the row."""
    ratio = torch.exp(masked_sum(proximal_logprobs - rollout_logprobs, mask))
    return per_token(ratio.masked_fill(ratio > cap, 0.0), mask)


@torch.no_grad()
def geometric_mask(
    proximal_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, low: float, high: float
) -> Tensor:
    """1 where the geometric mean of k over the row is in [low, high], else 0. It masks without weighing."""
    ratio = torch.exp(masked_mean(proximal_logprobs - rollout_logprobs, mask))
    return per_token(_one_or_zero(ratio, dropped=(ratio < low) | (ratio > high)), mask)


@torch.no_grad()
def off_policy_sequence_mask(
    logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, delta: float
) -> Tensor:
    """0 for rows of negative advantage with `mean_t(proximal - logprobs) > delta` nats, else 1.

    `advantages` [B], or [B, T] of which the mean over the mask counts. Source: DeepSeek-V3.2.
    """
    drift = masked_mean(proximal_logprobs - logprobs, mask)
    advantage = masked_mean(advantages, mask) if advantages.ndim == 2 else advantages
    evidence = torch.where(advantage.isnan(), advantage.to(drift.dtype), drift)
    return per_token(_one_or_zero(evidence, dropped=(advantage < 0) & (drift > delta)), mask)


def _one_or_zero(evidence: Tensor, *, dropped: Tensor) -> Tensor:
    """0 where `dropped`, else 1, and NaN where the `evidence` for that is NaN."""
    return torch.ones_like(evidence).masked_fill(dropped, 0.0).masked_fill(evidence.isnan(), float("nan"))
