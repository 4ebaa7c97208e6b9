"""What the program asks of an engine that generates. `vllm_engine` is the real one; unit tests may bring their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from rlhf.config import RunConfig
from rlhf.samples import VersionSpan

if TYPE_CHECKING:
    from rlhf.weight_sync.transports import PackedTensor

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample completions of one prompt. `temperature` 0 is greedy, `top_k` 0 all tokens.

    There is no seed for a request: vLLM's CPU sampler dies on one when a prompt is prefilled in parts, and on every
    device seeded requests are sampled one by one. The engine's own seed is that of the run.
    """

    samples: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, config: RunConfig, *, samples: int, temperature: float | None = None) -> Sampling:
        """As `rollouts` says, at another temperature where one is given."""
        rollouts = config.rollouts
        chosen = rollouts.temperature if temperature is None else temperature
        return cls(samples, rollouts.max_completion_tokens, chosen, rollouts.top_p, rollouts.top_k)


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion: `token_ids` int32 [T] and their `logprobs` float32 [T] in nats; spans cover all of them."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]
    version_spans: tuple[VersionSpan, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load of an engine now, and what happened since it was asked before.

    Requests that run and wait, the share of the key-value cache in use; prompt tokens looked up in the prefix cache and
    found there, requests preempted because the cache was full.
    """

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


def stats_metrics(engines: Sequence[EngineStats]) -> dict[str, float]:
    """`engine/...` of all engines: sums, the fullest cache, the prefix hits as a share of the tokens looked up."""
    queries = sum(one.prefix_queries for one in engines)
    metrics: dict[str, float] = {
        "engine/running": sum(one.running for one in engines),
        "engine/waiting": sum(one.waiting for one in engines),
        "engine/cache_usage_max": max((one.cache_usage for one in engines), default=0.0),
        "engine/preemptions": sum(one.preemptions for one in engines),
    }
    if queries:
        metrics["engine/prefix_hit_rate"] = sum(one.prefix_hits for one in engines) / queries
    return metrics


class AbortedError(Exception):
    """A request was aborted after `completion_tokens` of all its completions."""

    def __init__(self, completion_tokens: int) -> None:
        super().__init__(f"aborted after {completion_tokens} tokens")
        self.completion_tokens = completion_tokens


class GenerationEngine(Protocol):
    """Tokens in, tokens out. Weight-sync calls follow vLLM's native API: init, start, update, finish."""

    async def generate(
        self, request_id: str, prompt_token_ids: Tokens, sampling: Sampling, stop_token_ids: Sequence[int]
    ) -> list[Completion]:
        """Raises AbortedError when `abort` was called for this request."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request of `generate`; nothing happens when it has ended."""
        ...

    async def prompt_logprobs(self, token_ids: Tokens) -> list[float]:
        """Log-prob in nats of each token given the ones before, at temperature 1; entry 0 is 0."""
        ...

    async def stage_weights(self, version: int, number: int, tensors: Sequence[PackedTensor]) -> None:
        """Keep layer group `number` of a coming version; generation goes on."""
        ...

    async def load_staged_weights(self, version: int) -> None:
        """Load what was staged as `version`, from start to finish."""
        ...

    def stats(self) -> EngineStats: ...

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
