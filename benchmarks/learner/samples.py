"""Sequences with the lengths that a benchmark needs, in files that both an older and this checkout can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

LONG_TAILED = (16, 4096)


def long_tailed_lengths(count: int, seed: int = 0, bounds: tuple[int, int] = LONG_TAILED) -> np.ndarray:
    """Log-normal lengths int64 [count] between `bounds`: median 256, one in twenty above 1,600."""
    drawn = np.random.default_rng(seed).lognormal(np.log(256), 1.1, count)
    return np.clip(drawn, *bounds).astype(np.int64)


def uniform_lengths(count: int, bounds: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(*bounds, count)


def write_samples(path: Path, lengths: Sequence[int] | np.ndarray, vocabulary: int, prompt_share: float) -> Path:
    """Random tokens; the first `prompt_share` of each sequence is its prompt, at least one token."""
    lengths, random = np.asarray(lengths), np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompts = np.maximum(1, (lengths * prompt_share).astype(np.int64))
    token_ids = random.integers(10, vocabulary - 10, int(offsets[-1])).astype(np.int32)
    np.savez(path, token_ids=token_ids, offsets=offsets, prompt_tokens=prompts)
    return path
