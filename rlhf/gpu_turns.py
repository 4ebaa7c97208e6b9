"""Learner and engines on the same GPUs take turns: engines sleep while the learner computes."""

from __future__ import annotations

from typing import Protocol

ENGINE_PHASES = frozenset({"rollout", "sync", "evaluate"})


class Sleepers(Protocol):
    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class EngineTurns:
    """`GpuTurns` for colocated placement. Needs `max_staleness: 0`: a sleeping engine has no requests in flight."""

    def __init__(self, engines: Sleepers) -> None:
        self._engines = engines
        self._awake = True

    def enter(self, phase: str) -> None:
        wanted = phase in ENGINE_PHASES
        if wanted != self._awake:
            (self._engines.wake if wanted else self._engines.sleep)()
            self._awake = wanted
