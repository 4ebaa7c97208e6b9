"""The one place where per-token losses become a scalar.

A reduction is written as weights: `loss = sum(weights * token_loss)` over the trained tokens of the *global* batch of
an optimiser step. The weights are fixed before the first backward pass, from global counts, so the gradient does not
depend on how samples are split into micro-batches or over ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sequence_sum", "sequence_mean", "token_mean", "fixed_length"]
ReductionByLength = Literal["sequence_sum", "sequence_mean", "token_mean"]
"""Those that need no constant: what an algorithm without a field for C may offer."""


def sample_weights(
    tokens: Tensor, reduction: Reduction, *, fixed_length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [N] of the token losses of all N samples of one optimiser step, from their trained `tokens` [N].

    With `T_i` the trained tokens of sample i and `L` their sum: `sequence_sum` 1/N, `sequence_mean` 1/(N T_i),
    `token_mean` 1/L, `fixed_length` 1/(N C). A sample without trained tokens counts in N and contributes nothing.
    """
    samples, lengths = len(tokens), tokens.to(dtype)
    if reduction == "sequence_sum":
        return torch.full_like(lengths, 1.0 / max(samples, 1))
    if reduction == "sequence_mean":
        return 1.0 / (samples * lengths.clamp(min=1.0))
    if reduction == "token_mean":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1.0)
    if fixed_length is None:
        raise ValueError("reduction fixed_length needs the constant length C")
    return torch.full_like(lengths, 1.0 / (max(samples, 1) * fixed_length))
