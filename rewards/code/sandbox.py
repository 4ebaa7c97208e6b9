"""One running sandbox, seen from the trusted side: its pipes, its bounds, its end.

Whatever comes out of a sandbox is an answer to the question asked last, or a breach that ends it. Leaving the `with`
block kills everything in it and waits until the kernel has removed it.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rewards.code import launch, seccomp, slots
from rewards.code.cgroups import Cgroup
from rewards.code.launch import Limits, Mode, Tier
from rewards.code.slots import uid_of
from rlhf.errors import WorkerLostError

WATCH_EVERY_S = 0.05
START_DEADLINE_S = 30.0
FAREWELL_S = 0.5
END_DEADLINE_S = 5.0
_CHUNK = 1 << 16
_JOIN = 'for group do [ "$group" = -- ] && break; echo 0 > "$group" || exit 125; shift; done; shift; exec "$@"'


class Breach(Exception):
    """The candidate ended, overran or broke the protocol; `kind` is the word for it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Sandbox:
    """A started sandbox; use `Sandbox.start` in a `with` statement. Not thread-safe. `start_s`: how long it took."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits, tier: Tier, group: Cgroup | None) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._limits, self._tier, self._group = process, limits, tier, group
        self._stdin, self._stdout = process.stdin.fileno(), process.stdout.fileno()
        self._buffer = b""
        self.start_s = 0.0
        os.set_blocking(self._stdin, False)

    @classmethod
    @contextmanager
    def start(
        cls,
        tier: Tier,
        limits: Limits,
        mode: Mode,
        command: Sequence[str] = (),
    ) -> Iterator[Sandbox]:
        """A locked-down sandbox in a slot of its own, in which nothing foreign runs yet.

        Raises WorkerLostError when it does not start or cannot be cleared away afterwards.
        """
        with slots.slot() as number:
            group = Cgroup.create(number, limits.memory_bytes, limits.processes + 8)
            process = _spawn(tier, group, lambda fd: launch.arguments(tier, limits, mode, uid_of(number), command, fd))
            sandbox = cls(process, limits, tier, group)
            try:
                sandbox._wait_ready()
                yield sandbox
            finally:
                sandbox.end()

    def _wait_ready(self) -> None:
        started = time.monotonic()
        try:
            if self.receive(started + START_DEADLINE_S) != {"ready": True}:
                raise Breach("protocol", "it says something else")
        except Breach as breach:
            raise WorkerLostError(f"a code sandbox ({self._tier.value}) does not start: {breach}") from None
        self.start_s = time.monotonic() - started

    def ask(self, question: dict[str, Any], deadline: float) -> dict[str, Any]:
        """The answer to `question`, which travels under a fresh nonce. Raises Breach; never waits past `deadline`."""
        nonce = secrets.token_hex(8)
        if self._buffer or self._readable():
            raise Breach("protocol", "answered before it was asked")
        self.send({"nonce": nonce, **question}, deadline)
        answer = self.receive(deadline)
        if answer.get("nonce") != nonce:
            raise Breach("protocol", "answered another question than the one asked")
        return answer

    def send(self, message: dict[str, Any], deadline: float) -> None:
        """Write one line. Raises Breach."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            self._wait(self._stdin, select.POLLOUT, deadline)
            try:
                data = data[os.write(self._stdin, data) :]
            except BrokenPipeError:
                raise self._ended() from None

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next line, a JSON object. Raises Breach."""
        while b"\n" not in self._buffer:
            self._wait(self._stdout, select.POLLIN, deadline)
            chunk = os.read(self._stdout, _CHUNK)
            if not chunk:
                raise self._ended()
            self._buffer += chunk
            if len(self._buffer) > self._limits.output_bytes:
                raise Breach("output", f"answered more than {self._limits.output_bytes} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return _object(line)

    def farewell(self) -> None:
        """No more questions. Raises Breach when there is another answer: two processes may have given each."""
        self._close(self._process.stdin)
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        if poll.poll(FAREWELL_S * 1000) and (self._buffer or os.read(self._stdout, _CHUNK)):
            raise Breach("protocol", "answered more than it was asked")

    def communicate(self, data: bytes, deadline: float) -> bytes:
        """Everything a program prints when it is given `data`. Raises Breach."""
        pending, printed = memoryview(data), bytearray()
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        poll.register(self._stdin, select.POLLOUT)
        while True:
            for fd, _ in self._poll(poll, deadline):
                if fd == self._stdin:
                    pending = self._feed(pending)
                    if not pending:
                        poll.unregister(self._stdin)
                        self._close(self._process.stdin)
                    continue
                chunk = os.read(self._stdout, _CHUNK)
                printed += chunk
                if not chunk:
                    return bytes(printed)
                if len(printed) > self._limits.output_bytes:
                    raise Breach("output", f"printed more than {self._limits.output_bytes} bytes")

    def end(self) -> None:
        """Kill what runs in it and wait until it is gone. Raises WorkerLostError when it does not go."""
        self._close(self._process.stdin)
        try:
            self._kill()
            self._process.wait(END_DEADLINE_S)
            if self._group is not None:
                self._group.remove()
        except (subprocess.TimeoutExpired, OSError) as error:
            pid = self._process.pid
            raise WorkerLostError(f"a code sandbox cannot be ended: {error}. Look at process {pid}") from error
        finally:
            self._close(self._process.stdout)

    def _feed(self, pending: memoryview) -> memoryview:
        try:
            return pending[os.write(self._stdin, pending) :] if pending else pending
        except BrokenPipeError:  # it does not read its input; what it prints still counts
            return pending[len(pending) :]

    def _kill(self) -> None:
        if self._process.poll() is not None:
            return
        if self._tier in (Tier.LANDLOCK, Tier.UNSAFE):  # the supervisor ends the rest, then itself
            os.kill(self._process.pid, signal.SIGTERM)
            return
        first = _children(self._process.pid)  # process 1 of the namespace takes all others with it; its parent waits
        for pid in first or [self._process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        self._poll(poll, deadline)

    def _poll(self, poll: select.poll, deadline: float) -> list[tuple[int, int]]:
        """Events, never none. Raises Breach after the deadline or when the memory bound is broken."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._out_of_memory() or Breach("timeout", "gave no answer in time")
            if events := poll.poll(min(left, WATCH_EVERY_S) * 1000):
                return events
            self._watch()

    def _watch(self) -> None:
        """Raise Breach when the processes together hold too much of what the kernel does not bound by itself."""
        pids = _descendants(self._process.pid)
        if self._group is None:
            if len(pids) > self._limits.processes + 8:
                raise Breach("memory", f"ran more than {self._limits.processes} processes")
            if sum(map(_resident_bytes, pids)) > self._limits.memory_bytes:
                raise Breach("memory", f"used more than {self._limits.memory_bytes} bytes")
        if self._tmp_files(pids) > self._limits.tmp_files:
            raise Breach("memory", f"made more than {self._limits.tmp_files} files in /tmp")

    def _tmp_files(self, pids: Sequence[int]) -> int:
        """Files in /tmp where its file system has no bound on them: bubblewrap can set none."""
        if self._tier is not Tier.STRONG or len(pids) < 2:
            return 0
        with suppress(OSError):
            inside = f"/proc/{pids[1]}/root/tmp"
            # Until bubblewrap has changed the root, this is the /tmp of the host, whose files are not the candidate's.
            if Path(inside).stat().st_dev != Path("/tmp").stat().st_dev:
                found = os.statvfs(inside)
                return found.f_files - found.f_ffree
        return 0

    def _readable(self) -> bool:
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        return any(event & select.POLLIN for _, event in poll.poll(0))

    def _ended(self) -> Breach:
        return self._out_of_memory() or Breach("ended", "its process ended without an answer")

    def _out_of_memory(self) -> Breach | None:
        if self._group is not None and self._group.out_of_memory():
            return Breach("memory", f"used more than {self._limits.memory_bytes} bytes")
        return None

    @staticmethod
    def _close(stream: Any) -> None:
        with suppress(OSError):
            stream.close()


def _spawn(tier: Tier, group: Cgroup | None, command: Callable[[int], list[str]]) -> subprocess.Popen[bytes]:
    """Start `command(descriptor of the seccomp program)`, in the group from its first moment on."""
    joins = [*group.joins, "--"] if group is not None else ["--"]
    read, write = os.pipe()
    try:
        if tier is Tier.STRONG:
            os.write(write, seccomp.program())
        os.close(write)
        return subprocess.Popen(
            ["/bin/sh", "-c", _JOIN, "sh", *joins, *command(read)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[read] if tier is Tier.STRONG else [],
            env=launch.ENVIRONMENT,
            cwd="/",
            start_new_session=tier in (Tier.LANDLOCK, Tier.UNSAFE),  # its supervisor must outlive a kill of our group
        )
    finally:
        os.close(read)


def _object(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Breach("protocol", "answered with what is not JSON") from None
    if not isinstance(message, dict):
        raise Breach("protocol", "answered with what is not an object")
    return message


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _descendants(pid: int) -> list[int]:
    """`pid` and all below it, parents first."""
    found = [pid]
    for parent in found:
        found += _children(parent)
    return found


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0
