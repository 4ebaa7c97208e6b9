"""Sums over the tokens of a row. Entries off the mask may hold anything: they reach neither a value nor a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[B]: the sum of `values` [B, T] where `mask` bool [B, T]; 0 for a row without masked tokens."""
    return _on_mask(values, mask).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B]: the mean of `values` [B, T] where `mask` bool [B, T]; 0 for a row without masked tokens."""
    return masked_sum(values, mask) / _lengths(values, mask)


def reward_to_go(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: at token t the sum of `values` over the masked tokens s >= t; 0 off the mask."""
    return _on_mask(_on_mask(values, mask).flip(-1).cumsum(-1).flip(-1), mask)


def spread_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: `values` [B] divided by the number T_i of masked tokens, on each of them; 0 off the mask.

    A row sums to its value again, so a loss per sequence becomes one per token. The value of a row without masked
    tokens is lost.
    """
    return _on_mask((values / _lengths(values, mask))[:, None].expand(mask.shape), mask)


def _on_mask(values: Tensor, mask: Tensor) -> Tensor:
    # A product with the mask would turn NaN off the mask into NaN of the row.
    return torch.where(mask, values, torch.zeros_like(values))


def _lengths(like: Tensor, mask: Tensor) -> Tensor:
    """[B]: masked tokens, at least 1."""
    return mask.sum(-1).clamp(min=1).to(like.dtype)
