"""Ray shell of a rollout engine, and all engines of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf.cluster import Cluster, RayStored, awaited, gather, redirect_output, roles, settled
from rlhf.config import RunConfig
from rlhf.models import load_tokenizer, on_this_machine
from rlhf.samples import GroupTokens, SampleGroup, TextGroup
from rlhf.vllm_environment import vllm_environment
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.transports import PackedTensor, receiver_of
from rollouts.dispatcher import Aborted
from rollouts.engine import AbortedError, EngineStats, stats_metrics
from rollouts.generator import Facts, Generator, GroupRequest
from rollouts.rendering import Renderer
from rollouts.vllm_engine import VllmEngine, engine_settings

_SHUTDOWN_S = 10.0


class RolloutWorker:
    """One vLLM engine in its own process. All methods are coroutines, so requests run side by side."""

    def __init__(self, number: int, model_path: str, config: RunConfig, log: Path) -> None:
        redirect_output(log)
        self._arguments = (number, model_path, config)

    async def start(self) -> None:
        number, model_path, config = self._arguments
        model_path = str(on_this_machine(config.model, Path(model_path)))
        self._engine = VllmEngine(
            model_path,
            engine_settings(config),
            receiver_of(config.transport),
            config.seed + number,
        )
        tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
        renderer = Renderer(tokenizer, config.max_prompt_tokens, config.model.max_context_tokens)
        self._generator = Generator(self._engine, renderer)

    async def generate(self, request: GroupRequest) -> tuple[Facts | Aborted, GroupTokens | None, TextGroup | None]:
        """Three results: what the driver sees, and the tokens and text that it has no need to."""
        try:
            made = await self._generator.generate(request)
        except AbortedError as aborted:
            return Aborted(aborted.completion_tokens), None, None
        return Facts(made.samples, made.seconds), made.tokens, made.text

    async def abort(self, group_id: str) -> None:
        await self._engine.abort(group_id)

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def pause(self, clear_kv_cache: bool) -> None:
        await self._engine.pause(clear_kv_cache)

    async def resume(self) -> None:
        await self._engine.resume()

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer(init_info)

    async def stage_weights(self, version: int, number: int, tensors: Sequence[PackedTensor]) -> None:
        await self._engine.stage_weights(version, number, tensors)

    async def load_staged_weights(self, version: int) -> None:
        await self._engine.load_staged_weights(version)

    async def start_weight_update(self) -> None:
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, version: int) -> None:
        await self._engine.finish_weight_update(version)

    async def evidence(self, probe: Sequence[Sequence[int]]) -> Evidence:
        values = await asyncio.gather(*(self._engine.prompt_logprobs(tokens) for tokens in probe))
        return Evidence(await self._engine.weight_version(), await self._engine.weight_digests(), values)

    async def shutdown(self) -> None:
        await self._engine.shutdown()


class RayEngine:
    """`Engine` of the dispatcher over a `RolloutWorker`."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def generate(self, request: GroupRequest) -> SampleGroup | Aborted:
        facts, tokens, text = self._actor.generate.options(num_returns=3).remote(request)
        found = await awaited(facts, f"sampling group {request.group_id}")
        if isinstance(found, Aborted):
            return found
        stored = RayStored(tokens, text)
        prompt, mode = request.prompt, request.reasoning_mode
        return SampleGroup(request.group_id, prompt, mode, found.samples, found.seconds, stored)

    async def abort(self, group_id: str) -> None:
        await awaited(self._actor.abort.remote(group_id), f"abort of group {group_id}")


class RayEngines:
    """The control calls of a run, made on all its engines at once."""

    def __init__(self, cluster: Cluster, config: RunConfig, model_path: Path, log_dir: Path) -> None:
        self._config = config
        self._kept_syncs = 0
        shares_memory = config.transport == "cuda_ipc"
        device, cache = config.cluster.device, config.rollouts.kv_cache_gib
        variables = vllm_environment(device, cache, shares_memory=shares_memory)
        self.actors = [
            ray.remote(RolloutWorker)
            .options(max_concurrency=4096, **cluster.options(role, variables))
            .remote(number, str(model_path), config, log_dir / f"{role.name}.log")
            for number, role in enumerate(r for r in roles(config) if r.name.startswith("engine"))
        ]
        self._starting = [actor.start.remote() for actor in self.actors]

    def wait_until_started(self) -> None:
        gather(self._starting, "start of the engines", self._config.cluster.start_deadline_s)

    def metrics(self) -> dict[str, float]:
        """`engine/...`: load and cache of the engines, summed or at their worst."""
        stats = self._each("stats", lambda actor: actor.stats.remote())
        return {**stats_metrics(stats), "engine/kept_syncs": self._kept_syncs}

    def pause(self) -> None:
        """Stand still before a sync, and forget what the old weights made unless the configuration keeps it."""
        sync = self._config.weight_sync
        clear = sync.kv_cache == "recompute" or self._kept_syncs + 1 >= sync.max_kept_syncs
        self._kept_syncs = 0 if clear else self._kept_syncs + 1
        self._each("pause", lambda actor: actor.pause.remote(clear))

    def resume(self) -> None:
        self._each("resume", lambda actor: actor.resume.remote())

    def sleep(self) -> None:
        self._each("sleep", lambda actor: actor.sleep.remote())

    def wake(self) -> None:
        self._each("wake", lambda actor: actor.wake.remote())

    def evidence(self, probe: Sequence[Sequence[int]]) -> list[Evidence]:
        shared = ray.put(probe)
        return self._each("probe", lambda actor: actor.evidence.remote(shared))

    def shutdown(self) -> None:
        """Stop the engines so that nothing of theirs stays in shared memory."""
        settled([actor.shutdown.remote() for actor in self.actors], _SHUTDOWN_S)

    def _each(self, what: str, call: Callable[[ActorHandle], Any]) -> list[Any]:
        return gather([call(actor) for actor in self.actors], f"engines: {what}", self._config.weight_sync.deadline_s)
