"""One server process: waited for until it is healthy, started again when it ends, ended with its owner."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rewards import lifeline
from rlhf.errors import DeadlineError, GroupwiseError, WorkerLostError

POLL_S = 0.2
HEALTH_DEADLINE_S = 5.0  # of one health check
RESTART_PAUSE_S = 1.0
EXIT_DEADLINE_S = 5.0  # to end by itself after SIGTERM
LOG_LINES = 20
LOG_ERRORS = 5
LOG_BYTES = 64_000

_ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception)\b: ")


@dataclass(frozen=True, slots=True)
class Served:
    """What is run. `health_url` answers 200 once the server can be asked; its output goes to the end of `log`."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    health_url: str
    log: Path
    start_deadline_s: float
    max_restarts: int


class OwnedProcess:
    """A process group of its own that is killed when this object closes it, or when this process ends in any way."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        lifeline_read, self._lifeline = os.pipe()
        # Isolated and without site-packages: it starts in milliseconds, and imports nothing of the command's.
        launcher = [sys.executable, "-I", "-S", str(lifeline.__file__), str(lifeline_read)]
        try:
            with log.open("ab") as out:
                self._process = subprocess.Popen(
                    [*launcher, *command],
                    pass_fds=(lifeline_read,),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline_read)
        self.pid = self._process.pid

    def ended(self) -> str:
        """How it ended, "" while it runs. It is not reaped yet: its process group must stay addressable."""
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if state is None:
            return ""
        return f"{'exit code' if state.si_code == os.CLD_EXITED else 'signal'} {state.si_status}"

    def close(self) -> None:
        """End the group: asked to first, then killed; reap it. Once only."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + EXIT_DEADLINE_S
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(ProcessLookupError):  # what is left of it, before the wait frees its number
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._lifeline)


class Supervisor:
    """Keeps one server up, in a thread of its own, until `close()`.

    A process that ends, or that is not healthy in time, is followed by another, `max_restarts` times in all. One that
    ends before the server was ever healthy is not: it would end the same way again.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self.restarts = 0
        self.pid: int | None = None
        self._failure: GroupwiseError | None = None
        self._first = threading.Event()  # it was healthy once, or never will be
        self._up = threading.Event()
        self._closing = threading.Event()
        served.log.parent.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name=f"server-{served.name}", daemon=True)
        self._thread.start()

    def wait_until_healthy(self) -> None:
        """Returns once it was healthy. Raises DeadlineError or WorkerLostError with the end of its log."""
        self._first.wait()
        self.check()

    def check(self) -> None:
        """Raises WorkerLostError, or DeadlineError, once the server is given up."""
        if self._failure is not None:
            raise self._failure

    @property
    def up(self) -> bool:
        """The process that runs now was healthy."""
        return self._up.is_set()

    def close(self) -> None:
        """The server has ended."""
        self._closing.set()
        self._thread.join()

    # --- its lives ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._live()
        except Exception as error:
            self._failure = WorkerLostError(f"server {self._served.name}: it cannot be supervised: {error!r}")
            raise
        finally:
            self._first.set()

    def _live(self) -> None:
        while not self._closing.is_set():
            failure = self._one_life()
            if self._closing.is_set():
                return
            if not self._first.is_set() or self.restarts >= self._served.max_restarts:
                self._failure = self._last(failure)
                return
            self.restarts += 1
            self._note(f"{failure} Restart {self.restarts} of {self._served.max_restarts}.")
            self._closing.wait(RESTART_PAUSE_S)

    def _one_life(self) -> GroupwiseError:
        """Start the process and stay with it to its end: why it ended."""
        process = OwnedProcess(self._served.command, self._served.environment, self._served.log)
        self.pid = process.pid
        deadline = time.monotonic() + self._served.start_deadline_s
        try:
            while not (ended := process.ended()) and not self._closing.is_set():
                if not self._up.is_set() and self._healthy():
                    self._up.set()
                    self._first.set()
                if not self._up.is_set() and time.monotonic() > deadline:
                    rule = f"was not healthy within cluster.start_deadline_s = {self._served.start_deadline_s:g} s"
                    return DeadlineError(f"server {self._served.name} {rule}.")
                self._closing.wait(POLL_S)
            return WorkerLostError(f"server {self._served.name} ended: {ended or 'with the run'}.")
        finally:
            self._up.clear()
            self.pid = None
            process.close()

    def _healthy(self) -> bool:
        # Without the proxies of the environment: they do not know the machines of a cluster.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self._served.health_url, timeout=HEALTH_DEADLINE_S) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _last(self, failure: GroupwiseError) -> GroupwiseError:
        """The error that a person sees once the server is given up."""
        tried = f" after {self.restarts} of servers.{self._served.name}.max_restarts" if self._first.is_set() else ""
        shown = "\n".join(f"  {line}" for line in log_tail(self._served.log))
        return type(failure)(f"{failure} It is given up{tried}. The end of {self._served.log}:\n{shown}")

    def _note(self, text: str) -> None:
        with self._served.log.open("a") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def held_port(host: str) -> tuple[socket.socket, int]:
    """A free port, kept from everybody who asks for any port while the socket is open.

    A server that sets SO_REUSEADDR, as they all do, can still listen there; nobody is answered before it does.
    """
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, 0))
    return holder, int(holder.getsockname()[1])


def log_tail(path: Path) -> list[str]:
    """The last lines of a log, after the last errors further up: a server may say much while it ends."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - LOG_BYTES))
        lines = log.read().decode("utf-8", "replace").splitlines()
    errors = [line for line in lines[:-LOG_LINES] if _ERROR.search(line)][-LOG_ERRORS:]
    return [*errors, *(["..."] if errors else []), *lines[-LOG_LINES:]]
