"""Log-probs and entropy of given tokens from a causal model's logits."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-prob in nats of every token given the ones before it, under `softmax(logits / temperature)`.

    `logits` [B, T, V] as the model returns them (entry t predicts token t + 1); `token_ids` int64 [B, T].
    Returns float32 [B, T] aligned with `token_ids`; `[:, 0]` is 0 because nothing predicts the first token.
    """
    if logits.shape[:2] != token_ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not match token_ids {tuple(token_ids.shape)}")
    scaled = logits[:, :-1].float() / temperature
    chosen = scaled.gather(-1, token_ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(chosen - torch.logsumexp(scaled, dim=-1), (1, 0))


@torch.no_grad()
def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the distribution each token was drawn from. [B, T, V] -> float32 [B, T], `[:, 0]` is 0."""
    logprobs = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    # p * log p is 0 at p = 0, where the product of 0 and -inf would be NaN.
    terms = torch.where(logprobs.isinf(), torch.zeros_like(logprobs), logprobs.exp() * logprobs)
    return torch.nn.functional.pad(-terms.sum(-1), (1, 0))
