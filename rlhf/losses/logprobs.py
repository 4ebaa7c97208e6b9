"""Log-probs and entropy of given tokens straight from hidden states: no logits of all tokens ever exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 26
"""Logits computed at a time: 256 MiB in float32."""


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Tensor, Tensor]:
    """(log-probs [M], entropy [M]) in nats of `softmax((hidden @ weight.T + bias) / temperature)`.

    `hidden` [M, H] are the hidden states that predict `targets` int64 [M]; `weight` [V, H] and `bias` [V] are the
    output head. Both results are float32 or wider; log-probs carry gradient to `hidden`, `weight` and `bias`, entropy
    does not. Rows are taken in chunks of `chunk_logits / V`, and the backward pass computes the logits of a chunk
    again, unless all rows fit one chunk. So peak memory does not grow with M x V.
    """
    return _HeadLogprobs.apply(hidden, weight, bias, targets, temperature, chunk_logits)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  (autograd functions take no keywords)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_logits: int,
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, chunk_logits // weight.shape[0])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        kept: tuple[Tensor, ...] = ()
        for part in _chunks(len(hidden), rows):
            logits = _logits(hidden[part], weight, bias, temperature)
            softmax = _softmax_(logits, targets[part], logprobs[part], entropy[part], bias is not None)
            if len(hidden) <= rows and any(ctx.needs_input_grad):
                kept = softmax
        ctx.save_for_backward(hidden, weight, bias, targets, *kept)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        upstream = gradients[0]
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Sums over many chunks are float32: rounded to bfloat16 after each, small gradients would be lost.
        to_weight = _sum_like(weight, ctx.needs_input_grad[1])
        to_bias = _sum_like(bias, ctx.needs_input_grad[2])
        for part in _chunks(len(hidden), ctx.rows):
            weights, total = kept or _softmax(hidden[part], weight, bias, ctx.temperature)
            # d log p(target) / d logit = (1 at the target, else 0) - p, over the temperature.
            scale = (upstream[part] / ctx.temperature).to(weights.dtype)[:, None]
            slope = weights.mul_(-scale / total).scatter_add_(1, targets[part, None], scale)
            narrow = slope.to(weight.dtype)
            if to_hidden is not None:
                torch.mm(narrow, weight, out=to_hidden[part])
            if to_weight is not None:
                _add_product(to_weight, narrow, hidden[part])
            if to_bias is not None:
                to_bias += slope.sum(0)
        return (
            to_hidden,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if bias is None or to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[m, V], float32 or wider, in memory of their own."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _softmax_(
    logits: Tensor, targets: Tensor, logprobs: Tensor, entropy: Tensor, may_be_infinite: bool
) -> tuple[Tensor, Tensor]:
    """Fill `logprobs` and `entropy` [m]. Returns what `_softmax` does; `logits` are used up."""
    shifted = logits.sub_(logits.amax(-1, keepdim=True))
    chosen = shifted.gather(-1, targets[:, None]).squeeze(-1)
    weights = shifted.exp()
    total = weights.sum(-1)
    torch.sub(chosen, total.log(), out=logprobs)
    if may_be_infinite:
        # A bias of -inf bans a token: its share of the entropy is 0, where 0 * -inf would be NaN.
        shifted.clamp_(min=torch.finfo(shifted.dtype).min)
    # The entropy is log(total) - sum(p * shifted); the product is a dot per row, without a third table.
    expected = torch.bmm(weights[:, None], shifted[:, :, None]).view(-1) / total
    torch.sub(total.log(), expected, out=entropy)
    return weights, total[:, None]


def _softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """(weights [m, V], their sums [m, 1]): probabilities before the division, which would be one more pass."""
    logits = _logits(hidden, weight, bias, temperature)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return weights, weights.sum(-1, keepdim=True)


def _sum_like(parameter: Tensor | None, needed: bool) -> Tensor | None:
    if parameter is None or not needed:
        return None
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """`total` [V, H] += slope.T @ hidden."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, hidden)
    else:
        total += slope.T @ hidden
