"""`with phase("update"):` is the only instrumentation: time, and whose turn on a shared GPU it is."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class GpuTurns(Protocol):
    """Who may use a GPU that learner and engine share. `enter(phase)` returns when the owner of `phase` has it."""

    def enter(self, phase: str) -> None: ...


class Phases:
    """Seconds by phase name: of the current step in `step`, of the whole stage in `total`."""

    def __init__(self, turns: GpuTurns | None = None, spent: Mapping[str, float] | None = None) -> None:
        """`spent`: seconds of the stage before this process went on with it."""
        self._turns = turns
        self.step: dict[str, float] = {}
        self.total: dict[str, float] = defaultdict(float, spent or {})

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            if self._turns is not None:
                self._turns.enter(name)
            yield
        except Exception as error:
            error.add_note(f"in phase {name}, after {time.monotonic() - started:.1f} s")
            raise
        seconds = time.monotonic() - started
        self.step[name] = self.step.get(name, 0.0) + seconds
        self.total[name] += seconds

    def start_step(self) -> None:
        self.step = {}
