"""One killable grader process, from the parent's side: started, fed, read, killed."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rewards.foreign import Foreign
from rewards.registry import Abstain, RewardInput, Score
from rlhf.errors import ConfigError, DeadlineError, WorkerLostError

START_DEADLINE_S = 60.0
SEND_DEADLINE_S = 60.0
EXIT_DEADLINE_S = 2.0
MAX_LINE_BYTES = 1 << 20
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class Call:
    """Run the reward `component` with `params`; it may take `deadline_s`. A group reward gets a tuple of samples."""

    component: str
    sample: RewardInput | tuple[RewardInput, ...]
    params: Mapping[str, Any]
    deadline_s: float

    @property
    def samples(self) -> int:
        return len(self.sample) if isinstance(self.sample, tuple) else 1


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a verdict. `raised` and `invalid` are the author's function's doing and would happen again.

    Another attempt before `wait_s` have passed is in vain.
    """

    kind: Literal["raised", "invalid", "transient", "timeout", "crash", "memory"]
    message: str
    traceback: str = ""
    wait_s: float = 0.0

    @property
    def transient(self) -> bool:
        """Another attempt may end differently."""
        return self.kind == "transient" or self.fatal

    @property
    def fatal(self) -> bool:
        """The process that made this attempt is gone, or has to go."""
        return self.kind in ("timeout", "crash", "memory")


Verdict = Score | Abstain | Failure


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call: one verdict for each of its samples, after `seconds` in the process."""

    verdicts: tuple[Verdict, ...]
    seconds: float

    @property
    def failure(self) -> Failure | None:
        """The first failure among the verdicts."""
        return next((verdict for verdict in self.verdicts if isinstance(verdict, Failure)), None)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What is known of a registered reward: its parameters besides the sample, how it runs, what it still needs.

    `accepts` is None for any name, `requires` have no default. `version` changes with its source.
    """

    accepts: tuple[str, ...] | None
    requires: tuple[str, ...]
    group: bool = False
    is_async: bool = False
    missing_packages: tuple[str, ...] = ()
    version: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every child loads: `modules` that register rewards, and functions written for other trainers."""

    modules: tuple[str, ...] = ()
    foreign: tuple[Foreign, ...] = ()


class GraderProcess:
    """One child. Not thread-safe, except `kill`."""

    def __init__(self, memory_limit_bytes: int, setup: Setup, mode: Literal["one", "many"] = "one") -> None:
        requests_read, self._requests = os.pipe()
        self._results, results_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        theirs = (requests_read, results_write, lifeline_read)
        arguments = [mode, *map(str, theirs), str(memory_limit_bytes), json.dumps(asdict(setup))]
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
            ready = self.read(time.monotonic() + START_DEADLINE_S)
        except TimeoutError:
            raise DeadlineError(f"a grader process did not start within {START_DEADLINE_S:g} s") from None
        except EOFError:
            raise WorkerLostError(f"a grader process ended at start: {self._exit()}") from None
        if ready["kind"] == "config_error":
            raise ConfigError(ready["problems"])
        self.rewards = {name: _parameters(spec) for name, spec in ready["rewards"].items()}

    def run(self, calls: Sequence[Call]) -> list[Answer]:
        """Answers to the first calls: to all of them, or up to the one that cost this process its life."""
        with suppress(BrokenPipeError):  # it died before it could answer: the first read says how
            self.send(enumerate(calls))
        answers: list[Answer] = []
        for call in calls:
            answers.append(self._receive(call))
            self.calls += 1
            failure = answers[-1].failure
            if failure is not None and failure.fatal:
                self.kill()
                break
        return answers

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

    def send(self, calls: Iterable[tuple[int, Call]]) -> None:
        """Hand over numbered calls. Raises BrokenPipeError when the child is gone, DeadlineError when it takes none."""
        batch = [(n, pickle.dumps((c.component, c.sample, c.params, c.deadline_s), -1)) for n, c in calls]
        body = pickle.dumps(batch, -1)
        message = memoryview(len(body).to_bytes(8, "big") + body)
        deadline = time.monotonic() + SEND_DEADLINE_S
        while message:
            if not _wait(self._requests, select.POLLOUT, deadline):
                raise DeadlineError(f"grader process {self.pid} took no request for {SEND_DEADLINE_S:g} s")
            message = message[os.write(self._requests, message) :]

    def read(self, deadline: float) -> dict[str, Any]:
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

    def _receive(self, call: Call) -> Answer:
        started = time.monotonic()
        try:
            return answer_of(self.read(started + call.deadline_s), call, started)
        except TimeoutError:
            failure = Failure("timeout", f"overran its deadline of {call.deadline_s:g} s; its process was killed")
        except EOFError:
            failure = Failure("crash", f"its process ended without an answer: {self._exit()}")
        except (ValueError, KeyError) as error:
            failure = Failure("crash", f"its process broke the protocol: {error!r}")
        return Answer((failure,) * call.samples, time.monotonic() - started)

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


def answer_of(message: Mapping[str, Any], call: Call, started: float) -> Answer:
    """What a child's line says of `call`. Raises KeyError or ValueError when it breaks the protocol."""
    seconds = time.monotonic() - started
    if message["kind"] != "group":
        return Answer((_verdict(message),) * call.samples, seconds)
    verdicts = tuple(_verdict(verdict) for verdict in message["verdicts"])
    if len(verdicts) != call.samples:
        raise ValueError(f"{len(verdicts)} verdicts on {call.samples} samples")
    return Answer(verdicts, seconds)


def _verdict(message: Mapping[str, Any]) -> Verdict:
    match message["kind"]:
        case "score":
            return Score(float(message["value"]), message["reason"], message["parts"])
        case "abstain":
            return Abstain(message["reason"])
        case kind:
            return Failure(kind, message["message"], message["traceback"], float(message.get("wait_s", 0.0)))


def _parameters(spec: Mapping[str, Any]) -> Parameters:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
    return Parameters(**fields)


def _wait(fd: int, event: int, deadline: float) -> bool:
    """True when `fd` is ready for `event`, or hung up; asks once even after the deadline."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _python_path() -> str:
    """This process's import path, the folder that holds `rewards` first."""
    return os.pathsep.join([str(Path(__file__).resolve().parents[1]), *(path or str(Path.cwd()) for path in sys.path)])
