"""Killable grader processes: the parent's side.

A reward function may hang in C, eat memory or end its process, and none of that may take a trainer with it. So it runs
in a child that is started with exec (never a fork of a Ray process), limited in address space, killed at its deadline
and replaced. Calls travel in batches, verdicts come back one by one, so a deadline and a failure belong to one call.

Async functions run side by side in one further child (`rewards.lane`). When that one dies, the calls it was in the
middle of run again, each alone in a child of its own: so there too a failure belongs to the call that caused it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rewards.child import Answer, Call, Failure, GraderProcess, Parameters, Setup, Verdict
from rewards.foreign import Foreign
from rewards.grader import CANARY
from rewards.lane import Lane
from rewards.registry import RewardInput
from rlhf.errors import WorkerLostError

__all__ = ["Answer", "Call", "Failure", "Health", "Parameters", "ProcessPool", "Verdict"]

CANARY_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Health:
    """Of the `processes`, how many `answered` a canary, are `busy` with a call, or `failed` and were killed."""

    processes: int
    answered: int
    busy: int
    failed: int


class ProcessPool:
    """`processes` grader processes that run one call at a time; thread-safe, usable until `close()`.

    `modules` are imported in each child (never here). `rewards` says what the children have registered. Raises
    ConfigError when a module or a foreign function cannot be imported.
    """

    def __init__(
        self,
        processes: int,
        memory_limit_bytes: int,
        modules: Sequence[str] = (),
        calls_per_process: int = 10_000,
        foreign: Sequence[Foreign] = (),
        async_calls: int = 64,
    ) -> None:
        self._processes = processes
        self._memory_limit_bytes = memory_limit_bytes
        self._setup = Setup(tuple(modules), tuple(foreign))
        self._calls_per_process = calls_per_process
        self._lane = Lane(memory_limit_bytes, self._setup, async_calls, calls_per_process)
        self._closed = False
        self._lock = threading.Lock()  # of _closed and _alive
        self._alive: set[GraderProcess] = set()
        self._idle: queue.Queue[GraderProcess | None] = queue.Queue()  # None: a place without a process yet
        for _ in range(processes):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="grader")
        try:
            self.rewards, *_ = self._threads.map(self._start, range(processes))
        except BaseException:
            self.close()
            raise

    def run(self, calls: Sequence[Call]) -> list[Verdict]:
        """The verdict on the first sample of each call, as `answers`."""
        return [answer.verdicts[0] for answer in self.answers(calls)]

    def answers(self, calls: Sequence[Call]) -> list[Answer]:
        """One answer per call, in order. A call that overran or lost its process is a Failure; the others still run.

        Raises WorkerLostError when the pool is closed, before or meanwhile.
        """
        is_async = [self._is_async(call) for call in calls]
        beside, alone = ([row for row, one in enumerate(is_async) if one is wanted] for wanted in (True, False))
        pending = self._lane.submit([calls[row] for row in beside])
        answers: dict[int, Answer | None] = dict(zip(alone, self._run([calls[row] for row in alone]), strict=True))
        answers |= {row: future.result() for row, future in zip(beside, pending, strict=True)}
        suspects = [row for row, answer in answers.items() if answer is None]
        answers |= zip(suspects, self._run([calls[row] for row in suspects]), strict=True)
        return [answer for row in range(len(calls)) if (answer := answers[row]) is not None]

    def health(self) -> Health:
        """Has every process that is not at work answer a canary; one that does not is killed and will be replaced."""
        slots: list[GraderProcess | None] = []
        with suppress(queue.Empty):
            while True:
                slots.append(self._idle.get_nowait())
        for slot in slots:
            self._idle.put(slot)
        canary = Call(CANARY, RewardInput.of(""), {}, CANARY_DEADLINE_S)
        answers: list[Answer | None] = [*self._run([canary] * len(slots)), *self._lane.health(canary)]
        answered = sum(answer is not None and answer.failure is None for answer in answers)
        busy = self._processes - len(slots)
        return Health(busy + len(answers), answered, busy, len(answers) - answered)

    def pids(self) -> tuple[int, ...]:
        """The process ids of the live graders."""
        with self._lock:
            pids = [grader.pid for grader in self._alive]
        return tuple(sorted([*pids, *self._lane.pids()]))

    def close(self) -> None:
        """Kill every grader and what it started; afterwards no process is left and `run` raises."""
        with self._lock:
            self._closed = True
            graders = tuple(self._alive)
        for grader in graders:
            grader.kill()
        self._lane.close()
        for _ in range(self._processes):  # a run in flight sees its process end and gives its place back
            self._recycled(self._idle.get())
        for _ in range(self._processes):
            self._idle.put(None)
        self._threads.shutdown(wait=True)

    def _start(self, _: int) -> dict[str, Parameters]:
        with self._grader() as grader:
            return grader.rewards

    def _is_async(self, call: Call) -> bool:
        return call.component in self.rewards and self.rewards[call.component].is_async

    def _run(self, calls: Sequence[Call]) -> list[Answer]:
        """Answers of the processes that run one call at a time."""
        size = -(-len(calls) // self._processes)
        if size == len(calls):
            return self._run_chunk(calls)
        chunks = [calls[start : start + size] for start in range(0, len(calls), size)]
        return [answer for answers in self._threads.map(self._run_chunk, chunks) for answer in answers]

    def _run_chunk(self, calls: Sequence[Call]) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(calls):
            with self._grader() as grader:
                answers += grader.run(calls[len(answers) :])
        return answers

    @contextmanager
    def _grader(self) -> Iterator[GraderProcess]:
        """A grader of one's own: an idle one, or a fresh one where the last was killed or has served its calls."""
        slot = self._recycled(self._idle.get())
        try:
            if slot is None:
                slot = self._spawn()
                slot.wait_ready()
            yield slot
        except BaseException:
            if slot is not None:  # what it is in the middle of is unknown
                slot.kill()
            raise
        finally:
            self._idle.put(self._recycled(slot))

    def _spawn(self) -> GraderProcess:
        with self._lock:
            if self._closed:
                raise WorkerLostError("the grader pool is closed: no reward can be computed any more")
            grader = GraderProcess(self._memory_limit_bytes, self._setup)
            self._alive.add(grader)
        return grader

    def _recycled(self, slot: GraderProcess | None) -> GraderProcess | None:
        """`slot`, or None after clearing it away where it ended, was killed or has served its calls."""
        if slot is None or (slot.running and slot.calls < self._calls_per_process):
            return slot
        slot.kill()
        slot.close_pipes()
        with self._lock:
            self._alive.discard(slot)
        return None
