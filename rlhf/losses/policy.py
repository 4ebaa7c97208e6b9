"""Policy-gradient losses, to be minimised: [B, T] per token, or [B] per sequence where the name says so.

Gradient flows through `logprobs` alone (through `ratio` where that is the input), never into advantages or the other
log-probs. Without a clip in force the gradient at ratio 1 is REINFORCE's, `-A * grad logprobs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.losses.sequence import masked_mean, masked_sum


def clipped_surrogate(
    logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """`-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` with `ratio = exp(logprobs - proximal)`.

    `logprobs`, `proximal_logprobs` [B, T]; `advantages` [B] or [B, T]. Returns [B, T], unreduced.
    Source: PPO (1707.06347) eq. 7, with separate bounds as in DAPO (2503.14476).
    """
    ratio = _finite_exp(logprobs - proximal_logprobs.detach())
    return _clipped_loss(ratio, per_token(advantages.detach(), logprobs), clip_low, clip_high)


@torch.no_grad()
def clipped(
    logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """1.0 where `clipped_surrogate` has no gradient because the clip is active, else 0.0. [B, T]."""
    ratio = torch.exp(logprobs - proximal_logprobs)
    return clipped_ratio(ratio, per_token(advantages, logprobs), clip_low=clip_low, clip_high=clip_high)


@torch.no_grad()
def clipped_ratio(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """1.0 where a clipped surrogate of `ratio` has no gradient because the clip is active, else 0.0; of one shape."""
    above = (ratio > 1.0 + clip_high) & (advantages > 0)
    below = (ratio < 1.0 - clip_low) & (advantages < 0)
    return (above | below).to(ratio.dtype)


def sequence_ratio(logprobs: Tensor, proximal_logprobs: Tensor, mask: Tensor, *, mean: bool) -> Tensor:
    """[B]: `exp` of the mean (GSPO 2507.18071) or the sum (RLOO 2402.14740) of `logprobs - proximal` over the mask.

    Differentiable through `logprobs`. A row without masked tokens has ratio 1 and no gradient.
    """
    reduce = masked_mean if mean else masked_sum
    return _finite_exp(reduce(logprobs - proximal_logprobs.detach(), mask))


def clipped_sequence_surrogate(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """[B]: `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`; `ratio` and `advantages` [B].

    Source: GSPO (2507.18071), with `ratio` from `sequence_ratio`.
    """
    return _clipped_loss(ratio, advantages.detach(), clip_low, clip_high)


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """[B, T]: `-A * logprobs`; `advantages` [B] or [B, T]. Right for samples of the current weights only."""
    return -per_token(advantages.detach(), logprobs) * logprobs


def cispo(logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, *, ratio_high: float) -> Tensor:
    """[B, T]: `-sg(min(ratio, 1 + ratio_high)) * A * logprobs` with `ratio = exp(logprobs - proximal)`.

    `advantages` [B] or [B, T]. A large ratio is cut, but its token keeps a gradient. Source: CISPO (2506.13585).
    """
    return truncated_policy_gradient(logprobs, proximal_logprobs, advantages, cap=1.0 + ratio_high)


def truncated_policy_gradient(logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, *, cap: float) -> Tensor:
    """[B, T]: `-sg(min(pi / pi_rollout, cap)) * A * logprobs`; `advantages` [B] or [B, T].

    Source: AGAPO as in K-EXAONE (2601.01739) sec. 3.4.
    """
    ratio = torch.exp(logprobs.detach() - rollout_logprobs.detach())
    return ratio.clamp(max=cap) * reinforce(logprobs, advantages)


def _clipped_loss(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    inside = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, inside * advantages)


def _finite_exp(log_ratio: Tensor) -> Tensor:
    # An infinite ratio would turn the zero gradient of a clipped or masked token into 0 * inf; e^80 fits a float32.
    return torch.exp(log_ratio.clamp(max=80.0))


def per_token(values: Tensor, like: Tensor) -> Tensor:
    """[B] repeated over tokens, or [B, T] as it is."""
    return values[:, None].expand_as(like) if values.ndim == 1 else values
