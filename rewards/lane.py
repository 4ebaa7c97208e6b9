"""Async rewards: many calls in flight in one grader process.

A call that passes its deadline is cancelled in the child and the others go on. When the child blocks, ends or is
killed, nobody can say which of the calls in flight did it: all of them come back as None, to be run alone.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rewards.child import Answer, Call, GraderProcess, Setup, answer_of
from rlhf.errors import DeadlineError, WorkerLostError

GRACE_S = 2.0  # after its deadline a call may take so long to react to its cancellation
POLL_S = 0.25

Pending = Future[Answer | None]


class Lane:
    """At most `in_flight` calls at a time, all in one process that is started with the first. Thread-safe."""

    def __init__(self, memory_limit_bytes: int, setup: Setup, in_flight: int, calls_per_process: int) -> None:
        self._new = lambda: GraderProcess(memory_limit_bytes, setup, "many")
        self._calls_per_process = calls_per_process
        self._places = threading.Semaphore(in_flight)
        self._starting = threading.Lock()
        self._lock = threading.Lock()  # of _closed and _shifts
        self._closed = False
        self._shifts: list[Shift] = []

    def submit(self, calls: Sequence[Call]) -> list[Pending]:
        """The answers to come, None for a call whose process ended under it. Waits while all places are taken."""
        return [self._submit(call) for call in calls]

    def health(self, canary: Call) -> list[Answer | None]:
        """What the processes that take calls say to the canary; there is none before the first call."""
        with self._lock:
            shifts = [shift for shift in self._shifts if shift.takes_calls]
        return [shift.submit(canary).result() for shift in shifts]

    def pids(self) -> list[int]:
        with self._lock:
            return [shift.process.pid for shift in self._shifts]

    def close(self) -> None:
        """Kill the processes; calls in flight come back as None, and `submit` raises WorkerLostError."""
        with self._lock:
            self._closed = True
            shifts = list(self._shifts)
        for shift in shifts:
            shift.close()

    def _submit(self, call: Call) -> Pending:
        self._places.acquire()
        try:
            pending = self._shift().submit(call)
        except BaseException:
            self._places.release()
            raise
        pending.add_done_callback(lambda _: self._places.release())
        return pending

    def _shift(self) -> Shift:
        with self._starting:
            with self._lock:
                taking = [shift for shift in self._shifts if shift.takes_calls]
            return taking[0] if taking else self._started()

    def _started(self) -> Shift:
        with self._lock:
            if self._closed:
                raise WorkerLostError("the grader pool is closed: no reward can be computed any more")
            shift = Shift(self._new(), self._calls_per_process)
            self._shifts.append(shift)
        shift.start(self._left)
        return shift

    def _left(self, shift: Shift) -> None:
        with self._lock:
            self._shifts.remove(shift)


@dataclass(frozen=True, slots=True)
class InFlight:
    call: Call
    pending: Pending = field(default_factory=Future)
    started: float = field(default_factory=time.monotonic)

    @property
    def overdue_at(self) -> float:
        return self.started + self.call.deadline_s + GRACE_S


class Shift:
    """One process's life: takes calls until it has had its share, answers them, ends."""

    def __init__(self, process: GraderProcess, calls: int) -> None:
        self.process = process
        self._calls = calls
        self._numbers = itertools.count()
        self._sending = threading.Lock()  # of the pipe to the process, and of its closing
        self._lock = threading.Lock()  # of what follows
        self._in_flight: dict[int, InFlight] = {}
        self._retired = self._ended = False
        self._listener: threading.Thread | None = None

    @property
    def takes_calls(self) -> bool:
        return not self._retired and not self._ended and self.process.running

    def start(self, left: Callable[[Shift], None]) -> None:
        """Returns when the process is ready. `left` is called once, when it is gone."""
        try:
            self.process.wait_ready()
        except BaseException:
            self._end()
            left(self)
            raise
        self._listener = threading.Thread(target=self._listen, args=(left,), name="grader-lane", daemon=True)
        self._listener.start()

    def submit(self, call: Call) -> Pending:
        one = InFlight(call)
        with self._sending:
            with self._lock:
                if self._ended:
                    one.pending.set_result(None)
                    return one.pending
                number = next(self._numbers)
                self._in_flight[number] = one
                self._retired |= number + 1 >= self._calls
            try:
                self.process.send([(number, call)])
            except (BrokenPipeError, DeadlineError):
                self.process.kill()  # whoever listens sees the end of the pipe
        return one.pending

    def close(self) -> None:
        """Kill the process; calls in flight come back as None."""
        self.process.kill()
        if self._listener is not None:
            self._listener.join()

    def _listen(self, left: Callable[[Shift], None]) -> None:
        with suppress(EOFError, ValueError, KeyError):
            while not self._finished():
                with suppress(TimeoutError):
                    self._resolve(self.process.read(time.monotonic() + POLL_S))
        self._end()
        left(self)

    def _finished(self) -> bool:
        """A call did not react to its cancellation, or the share of calls is answered."""
        now = time.monotonic()
        with self._lock:
            overdue = any(now > one.overdue_at for one in self._in_flight.values())
            return overdue or (self._retired and not self._in_flight)

    def _resolve(self, message: dict[str, Any]) -> None:
        with self._lock:
            one = self._in_flight.pop(message["call"])
        answer = answer_of(message, one.call, one.started)
        failure = answer.failure
        self._retired |= failure is not None and failure.kind == "memory"
        one.pending.set_result(answer)

    def _end(self) -> None:
        self.process.kill()
        with self._sending, self._lock:
            self._ended = True
            self.process.close_pipes()
            lost, self._in_flight = list(self._in_flight.values()), {}
        for one in lost:
            one.pending.set_result(None)
