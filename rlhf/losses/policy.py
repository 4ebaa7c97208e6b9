"""Policy-gradient losses per token, to be minimised."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """`-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` with `ratio = exp(logprobs - proximal)`.

    `logprobs`, `proximal_logprobs` [B, T]; `advantages` [B] or [B, T]. Returns [B, T], unreduced.
    Gradient flows through `logprobs` only. At ratio 1 the gradient is REINFORCE's, `-A * grad logprobs`.
    Source: PPO (1707.06347) eq. 7, with separate bounds as in DAPO (2503.14476).
    """
    ratio = torch.exp(logprobs - proximal_logprobs.detach())
    advantages = per_token(advantages.detach(), logprobs)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


@torch.no_grad()
def clipped(
    logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """1.0 where `clipped_surrogate` has no gradient because the clip is active, else 0.0. [B, T]."""
    ratio = torch.exp(logprobs - proximal_logprobs)
    advantages = per_token(advantages, logprobs)
    above = (ratio > 1.0 + clip_high) & (advantages > 0)
    below = (ratio < 1.0 - clip_low) & (advantages < 0)
    return (above | below).to(logprobs.dtype)


def per_token(values: Tensor, like: Tensor) -> Tensor:
    """[B] repeated over tokens, or [B, T] as it is."""
    return values[:, None].expand_as(like) if values.ndim == 1 else values
