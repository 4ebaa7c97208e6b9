"""Estimates of KL(policy || reference) from sampled tokens, `u = logprobs - reference_logprobs`.

All [B, T], in nats, with gradient through `logprobs` only. "Value" is the expectation over tokens from the policy at a
given prefix, "gradient as a loss" that of the estimate differentiated on such samples. A sum of token-wise losses never
has the gradient of the KL of whole sequences, which also holds what a token does to the KL of those after it:
`E[sum_t (sum_{s >= t} u_s) grad logprobs_t]`, to be had from `kl_to_go`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.losses.sequence import reward_to_go


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`u`. Value: unbiased, of either sign. Gradient as a loss: zero in expectation, so it belongs in the reward."""
    return logprobs - reference_logprobs.detach()


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`u^2 / 2`. Value: biased, never negative. Gradient as a loss: of KL(policy || reference), on-policy."""
    return k1(logprobs, reference_logprobs).square() / 2.0


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`exp(-u) - 1 + u`. Value: unbiased if the policy gives weight wherever the reference does, never negative.

    Gradient as a loss: of the forward KL(reference || policy), on-policy. Source: GRPO (2402.03300).
    """
    log_ratio = k1(logprobs, reference_logprobs)
    # exp(-u) - 1 loses all digits at the small u of early training.
    return torch.expm1(-log_ratio) + log_ratio


def k3_weighted(logprobs: Tensor, proximal_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`(pi / pi_prox) * k3`, for tokens sampled from `pi_prox`; the ratio is differentiated too.

    Value: unbiased as `k3` is, also off-policy. Gradient as a loss: `(pi / pi_prox) u grad logprobs`, that of
    KL(policy || reference), also off-policy. Source: DeepSeek-V3.2.
    """
    return torch.exp(logprobs - proximal_logprobs.detach()) * k3(logprobs, reference_logprobs)


@torch.no_grad()
def kl_to_go(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """At token t the sum of u over the masked tokens s >= t; 0 off the mask, without gradient.

    Value: at the first masked token unbiased for the KL of whole sequences. Times `logprobs`, summed over the tokens of
    a sequence and never divided by its length, its gradient is that of the sequence KL (Tang & Munos, 2506.09477).
    """
    return reward_to_go(logprobs - reference_logprobs, mask)
