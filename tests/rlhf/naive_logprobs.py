"""Log-probs and entropy from logits of all tokens at once: what the chunked form in the package must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """[B, T] in nats from `logits` [B, T, V], whose entry t predicts token t + 1; `[:, 0]` and off `mask` are 0."""
    logprobs = torch.log_softmax(logits[:, :-1] / temperature, -1)
    chosen = torch.nn.functional.pad(logprobs.gather(-1, token_ids[:, 1:, None]).squeeze(-1), (1, 0))
    return chosen if mask is None else torch.where(mask, chosen, torch.zeros_like(chosen))


def logprobs_and_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """[M] and [M] in nats from `logits` [M, V] of `targets` [M]; a token of probability 0 has no share in entropy."""
    logprobs = torch.log_softmax(logits / temperature, -1)
    entropy = -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy
