"""Running out of memory, said with the settings that would have helped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf.config import RunConfig
from rlhf.errors import OutOfMemoryError

_ON_CPU = ("can't allocate memory", "not enough memory")
"""Words of torch's CPU allocator, in a plain RuntimeError."""


@contextmanager
def explained_memory(config: RunConfig, doing: str) -> Iterator[None]:
    """Turn an allocation that fails in the block into an OutOfMemoryError; `doing` is what ran, e.g. "update"."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"learner {doing}: out of memory. {_first_line(error)} {' '.join(remedies(config, doing))}"
        ) from error


def remedies(config: RunConfig, doing: str) -> list[str]:
    """Settings that lower the memory of a learner rank, the cheapest first; those already set are left out."""
    training, found = config.training, []
    if doing != "load_model":
        if not training.gradient_checkpointing:
            found.append("Set training.gradient_checkpointing=true to keep one layer's activations instead of all.")
        if config.token_budget > config.model.max_context_tokens:
            lowest = config.model.max_context_tokens
            found.append(f"Lower training.token_budget from {config.token_budget} to {lowest} tokens or more.")
    if training.zero_stage < 3:
        found.append("Set training.zero_stage=3 to spread the weights over the ranks too.")
    if not training.offload_optimizer and config.cluster.device == "cuda":
        found.append("Set training.offload_optimizer=true to keep the optimiser in host memory.")
    if not training.offload_parameters and config.cluster.device == "cuda":
        found.append("Set training.offload_parameters=true to keep the weights in host memory.")
    return [*found, f"Raise training.ranks from {training.ranks}, or lower model.max_context_tokens."]


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _ON_CPU)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0].rstrip('.')}." if lines else ""
