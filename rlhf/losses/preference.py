"""Losses over stored completions, to be minimised: [B] per completion, or [P] per pair.

Of `B = 2 P` rows of pairs, row 2k is the chosen and row 2k + 1 the rejected completion of pair k. Everywhere `logprobs`
[B, T] are the policy's and the only way gradient takes; `mask` bool [B, T] picks the completion tokens, and what stands
off it, NaN too, reaches neither a value nor a gradient. A completion without tokens has log-prob 0 and no gradient.
Sums and exponentials are float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.losses.sequence import masked_mean, masked_sum, spread_over_tokens


def sequence_logprob(logprobs: Tensor, mask: Tensor, *, mean: bool) -> Tensor:
    """[B], nats: the mean over the completion's tokens, or the sum."""
    wide = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    return (masked_mean if mean else masked_sum)(wide, mask)


def sequence_probability(logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B]: `exp((1/T_i) log pi(o_i))`, the geometric mean of the token probabilities; 1 for an empty completion.

    The mean is complete before the exponential: a row must not be split over ranks or chunks. Source: SimPER
    (2502.00883).
    """
    return sequence_logprob(logprobs, mask, mean=True).exp()


def probability_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """[B]: `-A_i exp((1/T_i) log pi(o_i))`; `advantages` [B].

    Its mean over rows is GROUPER's loss (2601.01739, sec. 3.5), and half of SimPER's with advantages 1 and -1.
    """
    return -advantages.detach() * sequence_probability(logprobs, mask)


def pair_margin(logprobs: Tensor, reference: Tensor, mask: Tensor, *, mean: bool) -> Tensor:
    """[P], nats: `Delta = [log pi/pi_ref](chosen) - [log pi/pi_ref](rejected)`; `reference` [B, T].

    Token sums, or with `mean` per-token averages of each completion.
    """
    wide = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    ratio = sequence_logprob(wide - reference.detach(), mask, mean=mean)
    return ratio[0::2] - ratio[1::2]


def dpo(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[P]: `-(1 - e) log sigmoid(beta Delta) - e log sigmoid(-beta Delta)` with `e = label_smoothing`.

    `margin` [P] from `pair_margin`. Finite for every finite margin. Source: DPO (2305.18290) eq. 7; cDPO for e > 0.
    """
    scaled = beta * margin
    return -(1.0 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def ipo(margin: Tensor, *, beta: float) -> Tensor:
    """[P]: `(Delta - 1 / (2 beta))^2`; `margin` [P] of per-token averages. Source: IPO (2310.12036)."""
    return (margin - 1.0 / (2.0 * beta)).square()


def spread_over_pairs(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: `values` [P] shared by the tokens of both completions, so that the mean over rows is that over pairs.

    Each row sums to its pair's value. Where one completion is empty the other takes its share too; the value of a pair
    of empty completions is lost, as it has no gradient through any token.
    """
    present = mask.any(-1).view(-1, 2).sum(-1).clamp(min=1).to(values.dtype)
    return spread_over_tokens((values * 2.0 / present).repeat_interleave(2), mask)
