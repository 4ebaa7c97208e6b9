"""The learner's line to the engines: vLLM's control calls and the staging of weights, made on every engine actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf.cluster import gather
from rlhf.weight_sync.transports import PackedTensor


class RayEngineClient:
    """`EngineClient` over Ray actors: all engines at once. Calls that wait fail by the deadline."""

    def __init__(self, engines: list[ActorHandle], ranks_per_engine: int, deadline_s: float) -> None:
        self._engines = engines
        self._ranks_per_engine = ranks_per_engine
        self._deadline_s = deadline_s
        self._staging: list[Any] = []
        self.version = 0
        self.address = ray.util.get_node_ip_address()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = [
            engine.init_weight_transfer.remote(self._for_engine(init_info, number))
            for number, engine in enumerate(self._engines)
        ]
        gather(calls, "weight sync: init", self._deadline_s)

    def stage_weights(self, number: int, tensors: Sequence[PackedTensor]) -> None:
        shared = ray.put(list(tensors))
        self._staging += [engine.stage_weights.remote(self.version, number, shared) for engine in self._engines]

    def wait_until_staged(self) -> None:
        staging, self._staging = self._staging, []
        gather(staging, "weight sync: stage", self._deadline_s)

    def load_staged_weights(self) -> None:
        self._each("load", "load_staged_weights", self.version)

    def start_weight_update(self) -> None:
        self._each("start", "start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._each("update", "update_weights", ray.put(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._each("finish", "finish_weight_update", self.version if weight_version is None else int(weight_version))

    def _each(self, what: str, method: str, *arguments: Any) -> None:
        calls = [getattr(engine, method).remote(*arguments) for engine in self._engines]
        gather(calls, f"weight sync: {what}", self._deadline_s)

    def _for_engine(self, init_info: dict[str, Any], number: int) -> dict[str, Any]:
        # NCCL ranks run on over all engines; vLLM hands every engine the offset of the first.
        if "rank_offset" not in init_info:
            return init_info
        return {**init_info, "rank_offset": init_info["rank_offset"] + number * self._ranks_per_engine}
