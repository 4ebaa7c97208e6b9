"""Ray shell of a rollout engine, and all engines plus reward workers as one client."""

from __future__ import annotations

import asyncio
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf.cluster import Cluster, gather, redirect_output, result, roles, wait_for_any
from rlhf.config import RunConfig
from rlhf.models import load_tokenizer
from rlhf.reward_failures import RewardFailures
from rlhf.samples import Prompt, SampleGroup, ScoredGroup
from rlhf.vllm_environment import vllm_environment
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.transports import PackedTensor, receiver_of
from rollouts.generator import Generator, GroupRequest
from rollouts.rendering import Renderer
from rollouts.vllm_engine import VllmEngine, engine_settings


class RolloutWorker:
    """One vLLM engine in its own process. All methods are coroutines, so requests run side by side."""

    def __init__(self, number: int, model_path: str, config: RunConfig, log: Path) -> None:
        redirect_output(log)
        self._arguments = (number, model_path, config)

    async def start(self) -> None:
        number, model_path, config = self._arguments
        self._engine = VllmEngine(
            model_path,
            engine_settings(config),
            receiver_of(config.transport),
            config.cluster.device,
            config.seed + number,
        )
        tokenizer = load_tokenizer(model_path, trust_remote_code=config.model.trust_remote_code)
        renderer = Renderer(tokenizer, config.max_prompt_tokens, config.model.max_context_tokens)
        self._generator = Generator(self._engine, renderer)

    async def generate(self, request: GroupRequest) -> SampleGroup:
        return await self._generator.generate(request)

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


class RolloutClient:
    """Engines and reward workers as one: groups go in as requests and come out scored."""

    def __init__(
        self, cluster: Cluster, config: RunConfig, model_path: Path, log_dir: Path, graders: list[ActorHandle]
    ) -> None:
        self._config = config
        self._graders = graders
        self._failures = RewardFailures(log_dir.parent)
        self._next_grader = itertools.cycle(graders)
        self._pending: dict[Any, int] = {}  # scored reference -> engine
        variables = vllm_environment(config.cluster.device, config.rollouts.kv_cache_gib)
        self.engines = [
            ray.remote(RolloutWorker)
            .options(max_concurrency=4096, **cluster.options(role, variables))
            .remote(number, str(model_path), config, log_dir / f"{role.name}.log")
            for number, role in enumerate(r for r in roles(config) if r.name.startswith("engine"))
        ]
        self._starting = [engine.start.remote() for engine in self.engines]

    def wait_until_started(self) -> None:
        gather(self._starting, "start of the engines", self._config.cluster.start_deadline_s)

    def submit(self, request: GroupRequest) -> None:
        """Sample on the engine with the least to do, then score; the group goes from worker to worker directly."""
        load = [0] * len(self.engines)
        for engine in self._pending.values():
            load[engine] += 1
        number = load.index(min(load))
        group = self.engines[number].generate.remote(request)
        grader = next(self._next_grader)
        self._pending[grader.score.remote(group)] = number

    def completed(self, timeout_s: float) -> list[ScoredGroup]:
        """Groups that finished; waits for the first one. Empty only after `timeout_s`."""
        finished, _ = wait_for_any(list(self._pending), timeout_s)
        for reference in finished:
            del self._pending[reference]
        groups = [result(reference, "a rollout or its reward") for reference in finished]
        return [self._failures.recorded(group) for group in groups]

    def run(self, requests: Sequence[GroupRequest], deadline_s: float) -> list[ScoredGroup]:
        """All of `requests`, in order, beside whatever else is in flight."""
        references = []
        for number, request in enumerate(requests):
            group = self.engines[number % len(self.engines)].generate.remote(request)
            references.append(self._graders[number % len(self._graders)].score.remote(group))
        what = f"sampling {requests[0].group_id} and on" if requests else "sampling"
        return [self._failures.recorded(group) for group in gather(references, what, deadline_s)]

    def reward_metrics(self, deadline_s: float = 5.0) -> dict[str, float]:
        """`reward_service/...` of all reward workers as `merged` says, with those that answer within `deadline_s`."""
        asked = [call.remote() for grader in self._graders for call in (grader.metrics, grader.health)]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=deadline_s) if asked else ([], [])
        done = set(answered)
        metrics, health = (
            [result(reference, "metrics of a reward worker") for reference in part if reference in done]
            for part in (asked[::2], asked[1::2])
        )
        return merged(metrics, health, silent=len(self._graders) - min(len(metrics), len(health)))

    def pause(self) -> None:
        clear = self._config.weight_sync.clear_kv_cache
        self._each("pause", lambda engine: engine.pause.remote(clear))

    def resume(self) -> None:
        self._each("resume", lambda engine: engine.resume.remote())

    def sleep(self) -> None:
        self._each("sleep", lambda engine: engine.sleep.remote())

    def wake(self) -> None:
        self._each("wake", lambda engine: engine.wake.remote())

    def evidence(self, probe: Sequence[Sequence[int]]) -> list[Evidence]:
        shared = ray.put(probe)
        return self._each("probe", lambda engine: engine.evidence.remote(shared))

    def shutdown(self) -> None:
        """Stop the engines so that nothing of theirs stays in shared memory."""
        self._each("shutdown", lambda engine: engine.shutdown.remote())

    def _each(self, what: str, call: Callable[[ActorHandle], Any]) -> list[Any]:
        return gather([call(e) for e in self.engines], f"engines: {what}", self._config.weight_sync.deadline_s)


def merged(metrics: Sequence[Mapping[str, float]], health: Sequence[Any], silent: int) -> dict[str, float]:
    """Counts and queues of all workers summed; of latencies the worst worker's, as no percentile can be merged.

    `processes`, `processes_busy` and `processes_failed` are of the workers that answered, all but `silent_workers`.
    """
    merged: dict[str, float] = {}
    for key, value in (item for of in metrics for item in of.items()):
        joined = max if "/latency_" in key else operator.add
        merged[key] = joined(merged[key], value) if key in merged else value
    merged["reward_service/processes"] = sum(one.processes for one in health)
    merged["reward_service/processes_busy"] = sum(one.busy for one in health)
    merged["reward_service/processes_failed"] = sum(one.failed for one in health)
    return merged | {"reward_service/silent_workers": silent}


class GroupDispatcher:
    """`Dispatcher` of training groups: adds the sampling settings of the run to each prompt."""

    def __init__(self, client: RolloutClient, config: RunConfig, reasoning_mode: Callable[[int], bool]) -> None:
        """`reasoning_mode(i)` says in which mode the i-th prompt is asked."""
        self._client = client
        self._config = config
        self._reasoning_mode = reasoning_mode
        self._count = 0

    def submit(self, group_id: str, prompt: Prompt) -> None:
        rollouts = self._config.rollouts
        number, self._count = self._count, self._count + 1
        self._client.submit(
            GroupRequest(
                group_id=group_id,
                prompt=prompt,
                reasoning_mode=self._reasoning_mode(number),
                samples=rollouts.group_size,
                max_tokens=rollouts.max_completion_tokens,
                temperature=rollouts.temperature,
                top_p=rollouts.top_p,
                top_k=rollouts.top_k,
            )
        )

    def completed(self, timeout_s: float) -> list[ScoredGroup]:
        return self._client.completed(timeout_s)
