"""Terms added to a reward before any baseline."""

from __future__ import annotations

from torch import Tensor


def soft_overlong_penalty(completion_tokens: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """0 up to `max_tokens - buffer_tokens`, from there linear to -1 at `max_tokens`, and -1 beyond.

    `completion_tokens` [N], integer or float. Returns float [N]. Raises ValueError unless
    0 < `buffer_tokens` <= `max_tokens`. Source: DAPO (2503.14476).
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens {buffer_tokens} must be in 1 .. max_tokens {max_tokens}")
    return ((max_tokens - buffer_tokens - completion_tokens) / buffer_tokens).clamp(-1.0, 0.0)
