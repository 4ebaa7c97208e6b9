"""The learner's line to the engines: vLLM's four control calls, made on every engine actor."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf.cluster import gather


class RayEngineClient:
    """`EngineClient` over Ray actors. Every call returns when all engines have done it, or fails by the deadline."""

    def __init__(self, engines: list[ActorHandle], ranks_per_engine: int, deadline_s: float) -> None:
        self._engines = engines
        self._ranks_per_engine = ranks_per_engine
        self._deadline_s = deadline_s
        self.version = 0
        """The version the next `finish_weight_update` announces; vLLM's own transports do not pass one."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = [
            engine.init_weight_transfer.remote(self._for_engine(init_info, number))
            for number, engine in enumerate(self._engines)
        ]
        gather(calls, "weight sync: init", self._deadline_s)

    def start_weight_update(self) -> None:
        gather([e.start_weight_update.remote() for e in self._engines], "weight sync: start", self._deadline_s)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        shared = ray.put(update_info)
        gather([e.update_weights.remote(shared) for e in self._engines], "weight sync: update", self._deadline_s)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.version if weight_version is None else int(weight_version)
        calls = [e.finish_weight_update.remote(version) for e in self._engines]
        gather(calls, "weight sync: finish", self._deadline_s)

    def _for_engine(self, init_info: dict[str, Any], number: int) -> dict[str, Any]:
        # NCCL ranks run on over all engines; vLLM hands every engine the offset of the first.
        if "rank_offset" not in init_info:
            return init_info
        return {**init_info, "rank_offset": init_info["rank_offset"] + number * self._ranks_per_engine}
