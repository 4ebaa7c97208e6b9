"""The one place where per-token losses become a scalar.

A reduction is written as weights: `loss = sum(weights * token_loss)` over the *global* batch of an optimiser step. The
weights are fixed before the first backward pass, from global counts, so the gradient does not depend on how rows are
split into micro-batches, over ranks, or padded.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sequence_sum", "sequence_mean", "token_mean", "fixed_length"]
ReductionByLength = Literal["sequence_sum", "sequence_mean", "token_mean"]
"""Those that need no constant: what an algorithm without a field for C may offer."""


def token_weights(
    loss_mask: Tensor, reduction: Reduction, *, fixed_length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [N, T] for all N rows of one optimiser step, from their `loss_mask` bool [N, T]; zero off the mask.

    With `T_i` the masked tokens of row i and `L` their sum: `sequence_sum` 1/N, `sequence_mean` 1/(N T_i),
    `token_mean` 1/L, `fixed_length` 1/(N C). A row without masked tokens counts in N and contributes nothing.
    """
    mask = loss_mask.to(dtype)
    rows, lengths = mask.shape[0], mask.sum(-1, keepdim=True)
    if reduction == "sequence_sum":
        return mask / rows
    if reduction == "sequence_mean":
        return mask / (rows * lengths.clamp(min=1.0))
    if reduction == "token_mean":
        return mask / lengths.sum().clamp(min=1.0)
    if fixed_length is None:
        raise ValueError("reduction fixed_length needs the constant length C")
    return mask / (rows * fixed_length)
