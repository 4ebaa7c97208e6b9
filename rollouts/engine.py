"""What the program asks of an engine that generates. `vllm_engine` is the real one; unit tests may bring their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from rlhf.samples import VersionSpan
from rlhf.weight_sync.transports import PackedTensor

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """How to sample completions of one prompt. `temperature` 0 is greedy.

    There is no seed for a request: vLLM's CPU sampler dies on one when a prompt is prefilled in parts, and on every
    device seeded requests are sampled one by one. The engine's own seed is that of the run.
    """

    samples: int
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion: `token_ids` int32 [T] and their `logprobs` float32 [T] in nats; spans cover all of them."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]
    version_spans: tuple[VersionSpan, ...]


class GenerationEngine(Protocol):
    """Tokens in, tokens out. Weight-sync calls follow vLLM's native API: init, start, update, finish."""

    async def generate(self, prompt_token_ids: Tokens, request: SamplingRequest) -> list[Completion]: ...

    async def prompt_logprobs(self, token_ids: Tokens) -> list[float]:
        """Log-prob in nats of each token given the ones before, at temperature 1; entry 0 is 0."""
        ...

    async def stage_weights(self, version: int, number: int, tensors: Sequence[PackedTensor]) -> None:
        """Keep layer group `number` of a coming version; generation goes on."""
        ...

    async def load_staged_weights(self, version: int) -> None:
        """Load what was staged as `version`, from start to finish."""
        ...

    async def pause(self, clear_kv_cache: bool) -> None: ...

    async def resume(self) -> None: ...

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, update_info: dict[str, Any]) -> None: ...

    async def finish_weight_update(self, version: int) -> None: ...

    async def weight_digests(self) -> list[dict[str, str]]:
        """For each tensor-parallel worker, the digest of every tensor received in the last update."""
        ...

    async def weight_version(self) -> int: ...

    async def shutdown(self) -> None: ...
