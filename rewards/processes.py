"""Killable grader processes: the parent's side.

A reward function may hang in C, eat memory or end its process, and none of that may take a trainer with it. So it runs
in a child that is started with exec (never a fork of a Ray process), limited in address space, killed at its deadline
and replaced. Calls travel in batches, verdicts come back one by one, so a deadline and a failure belong to one call.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewards.registry import Abstain, RewardInput, Score
from rlhf.errors import ConfigError, DeadlineError, WorkerLostError

START_DEADLINE_S = 60.0
SEND_DEADLINE_S = 60.0
EXIT_DEADLINE_S = 2.0
MAX_LINE_BYTES = 1 << 20
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class Call:
    """Run the reward `component` on `sample` with `params`; it may take `deadline_s`."""

    component: str
    sample: RewardInput
    params: Mapping[str, Any]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a verdict. `raised` and `invalid` are the author's function's doing and would happen again."""

    kind: Literal["raised", "invalid", "timeout", "crash", "memory"]
    message: str
    traceback: str = ""

    @property
    def transient(self) -> bool:
        """Another attempt may end differently; the process that made this one is gone."""
        return self.kind in ("timeout", "crash", "memory")


Verdict = Score | Abstain | Failure


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a reward takes besides the sample: `accepts` is None for any name, `requires` have no default."""

    accepts: tuple[str, ...] | None
    requires: tuple[str, ...]


class ProcessPool:
    """`processes` grader processes that run rewards; thread-safe, usable until `close()`.

    `modules` are imported in each child (never here). `rewards` says what the children have registered. Raises
    ConfigError when a module cannot be imported.
    """

    def __init__(
        self,
        processes: int,
        memory_limit_bytes: int,
        modules: Sequence[str] = (),
        calls_per_process: int = 10_000,
    ) -> None:
        self._processes = processes
        self._memory_limit_bytes = memory_limit_bytes
        self._modules = tuple(modules)
        self._calls_per_process = calls_per_process
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
        """One verdict per call, in order. A call that overran or lost its process is a Failure; the others still run.

        Raises WorkerLostError when the pool is closed, before or meanwhile.
        """
        size = -(-len(calls) // self._processes)
        if size == len(calls):
            return self._run_chunk(calls)
        chunks = [calls[start : start + size] for start in range(0, len(calls), size)]
        return [verdict for verdicts in self._threads.map(self._run_chunk, chunks) for verdict in verdicts]

    def pids(self) -> tuple[int, ...]:
        """The process ids of the live graders."""
        with self._lock:
            return tuple(sorted(grader.pid for grader in self._alive))

    def close(self) -> None:
        """Kill every grader and what it started; afterwards no process is left and `run` raises."""
        with self._lock:
            self._closed = True
            graders = tuple(self._alive)
        for grader in graders:
            grader.kill()
        for _ in range(self._processes):  # a run in flight sees its process end and gives its place back
            self._recycled(self._idle.get())
        for _ in range(self._processes):
            self._idle.put(None)
        self._threads.shutdown(wait=True)

    def _start(self, _: int) -> dict[str, Parameters]:
        with self._grader() as grader:
            return grader.rewards

    def _run_chunk(self, calls: Sequence[Call]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        while len(verdicts) < len(calls):
            with self._grader() as grader:
                verdicts += grader.run(calls[len(verdicts) :])
        return verdicts

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
            grader = GraderProcess(self._memory_limit_bytes, self._modules)
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


class GraderProcess:
    """One child. Not thread-safe, except `kill`."""

    def __init__(self, memory_limit_bytes: int, modules: Sequence[str]) -> None:
        requests_read, self._requests = os.pipe()
        self._results, results_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        theirs = (requests_read, results_write, lifeline_read)
        arguments = [*map(str, theirs), str(memory_limit_bytes), *modules]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rewards.grader", *arguments],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what an author prints must not get lost, and is no result
                env=os.environ | ONE_THREAD | {"PYTHONPATH": _python_path()},
                start_new_session=True,  # one group to kill, and Ctrl-C reaches the parent alone
            )
        finally:
            for fd in theirs:
                os.close(fd)
        os.set_blocking(self._requests, False)
        self.pid = self._process.pid
        self.rewards: dict[str, Parameters] = {}
        self.calls = 0
        self.killed = False
        self._kill_lock = threading.Lock()
        self._buffer = b""

    def wait_ready(self) -> None:
        """Returns when the child has loaded its modules. Raises ConfigError when it cannot."""
        try:
            ready = self._read(time.monotonic() + START_DEADLINE_S)
        except TimeoutError:
            raise DeadlineError(f"a grader process did not start within {START_DEADLINE_S:g} s") from None
        except EOFError:
            raise WorkerLostError(f"a grader process ended at start: {self._exit()}") from None
        if ready["kind"] == "config_error":
            raise ConfigError(ready["problems"])
        self.rewards = {name: _parameters(spec) for name, spec in ready["rewards"].items()}

    def run(self, calls: Sequence[Call]) -> list[Verdict]:
        """Verdicts on the first calls: on all of them, or up to the one that cost this process its life."""
        with suppress(BrokenPipeError):  # it died before it could answer: the first read says how
            self._send(calls)
        verdicts: list[Verdict] = []
        for call in calls:
            verdicts.append(self._receive(call))
            self.calls += 1
            if isinstance(verdicts[-1], Failure) and verdicts[-1].transient:
                self.kill()
                break
        return verdicts

    def kill(self) -> None:
        """End the child and everything in its process group, and reap it. Does nothing the second time."""
        with self._kill_lock:
            if self.killed:
                return
            self.killed = True
            with suppress(ProcessLookupError):  # before the wait: the id cannot have been given to someone else
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def close_pipes(self) -> None:
        """For the thread that uses this process, after `kill`: never under a read of another thread."""
        for fd in (self._requests, self._results, self._lifeline):
            os.close(fd)

    @property
    def running(self) -> bool:
        """False once it was killed or has ended by itself."""
        with self._kill_lock:
            return not self.killed and self._ended() is None

    def _receive(self, call: Call) -> Verdict:
        try:
            return _verdict(self._read(time.monotonic() + call.deadline_s))
        except TimeoutError:
            return Failure("timeout", f"overran its deadline of {call.deadline_s:g} s; its process was killed")
        except EOFError:
            return Failure("crash", f"its process ended without an answer: {self._exit()}")
        except (ValueError, KeyError) as error:
            return Failure("crash", f"its process broke the protocol: {error!r}")

    def _send(self, calls: Sequence[Call]) -> None:
        body = pickle.dumps([pickle.dumps((call.component, call.sample, call.params), -1) for call in calls], -1)
        message = memoryview(len(body).to_bytes(8, "big") + body)
        deadline = time.monotonic() + SEND_DEADLINE_S
        while message:
            if not _wait(self._requests, select.POLLOUT, deadline):
                raise DeadlineError(f"grader process {self.pid} took no request for {SEND_DEADLINE_S:g} s")
            message = message[os.write(self._requests, message) :]

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next line. Raises TimeoutError after `deadline` (monotonic seconds), EOFError when the child is gone."""
        while b"\n" not in self._buffer:
            if not _wait(self._results, select.POLLIN, deadline):
                raise TimeoutError
            chunk = os.read(self._results, 1 << 16)
            if not chunk:
                raise EOFError
            self._buffer += chunk
            if len(self._buffer) > MAX_LINE_BYTES:
                raise ValueError(f"more than {MAX_LINE_BYTES} bytes in one answer")
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _exit(self) -> str:
        """How the child ended, waited for."""
        deadline = time.monotonic() + EXIT_DEADLINE_S
        while time.monotonic() < deadline:
            with self._kill_lock:
                if self.killed:
                    return "it was killed"
                ended = self._ended()
            if ended is not None:
                return f"{'exit code' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status}"
            time.sleep(0.002)
        return "it closed its pipe and is still running"

    def _ended(self) -> os.waitid_result | None:
        """How it ended, without reaping it: its process group must stay addressable for `kill`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)


def _verdict(message: Mapping[str, Any]) -> Verdict:
    match message["kind"]:
        case "score":
            return Score(float(message["value"]), message["reason"], message["parts"])
        case "abstain":
            return Abstain(message["reason"])
        case kind:
            return Failure(kind, message["message"], message["traceback"])


def _parameters(spec: Mapping[str, Any]) -> Parameters:
    accepts = spec["accepts"]
    return Parameters(None if accepts is None else tuple(accepts), tuple(spec["requires"]))


def _wait(fd: int, event: int, deadline: float) -> bool:
    """True when `fd` is ready for `event`, or hung up; asks once even after the deadline."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _python_path() -> str:
    """This process's import path, the folder that holds `rewards` first."""
    return os.pathsep.join([str(Path(__file__).resolve().parents[1]), *(path or str(Path.cwd()) for path in sys.path)])
