"""Log-probs and entropy of given tokens from a causal model's logits."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Log-prob in nats of every token given the ones before it, under `softmax(logits / temperature)`.

    `logits` [B, T, V] as the model returns them (entry t predicts token t + 1); `token_ids` int64 [B, T]. Returns
    [B, T] aligned with `token_ids`, float32 or wider; `[:, 0]` is 0 because nothing predicts the first token. With
    `mask` bool [B, T] tokens off it are 0, and whatever their logits hold (NaN too) reaches no value and no gradient.
    """
    wanted = _predicted(logits, token_ids, mask)
    scaled = _scaled(logits, wanted, temperature)
    chosen = scaled.gather(-1, token_ids[wanted][:, None]).squeeze(-1)
    return _spread(chosen - torch.logsumexp(scaled, dim=-1), wanted)


@torch.no_grad()
def token_entropy(logits: Tensor, token_ids: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the distribution each token was drawn from: [B, T] like `token_logprobs`, `[:, 0]` is 0."""
    wanted = _predicted(logits, token_ids, mask)
    logprobs = torch.log_softmax(_scaled(logits, wanted, temperature), dim=-1)
    # p * log p is 0 at p = 0, where the product of 0 and -inf would be NaN.
    terms = torch.where(logprobs.isneginf(), torch.zeros_like(logprobs), logprobs.exp() * logprobs)
    return _spread(-terms.sum(-1), wanted)


def _predicted(logits: Tensor, token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Bool [B, T]: the tokens that something predicts, or those of them on the mask."""
    if logits.shape[:2] != token_ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not match token_ids {tuple(token_ids.shape)}")
    wanted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.clone()
    wanted[:, 0] = False
    return wanted


def _scaled(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """[M, V] of the M wanted tokens. Only these are copied and widened: prompts and padding cost no memory here."""
    chosen = logits[:, :-1][wanted[:, 1:]]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)) / temperature


def _spread(values: Tensor, wanted: Tensor) -> Tensor:
    """[M] back to [B, T], zero elsewhere."""
    return torch.zeros(wanted.shape, dtype=values.dtype, device=values.device).masked_scatter(wanted, values)
