"""What an attack could harm or take on this machine, and whether it has.

The canary folder may be written by every user, the secret be read by every user, the ports be reached by every process:
only the sandbox stands before them. Names and numbers are what the programs get for their placeholders.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any

import rewards.code
from rewards.code import slots

SECRET_NAME = "GROUPWISE_ATTACK_SECRET"
MARK = "groupwise-attack"  # begins the name of whatever a program tries to leave behind
SHARED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/usr", "/usr/lib")
GRACE_S = 2.0
LISTENING, UDP_UNCONNECTED = "0A", "07"


class Host:
    """Canary, secret, victim and ports; use it in a `with` statement, which puts all of it away."""

    def __enter__(self) -> Host:
        with ExitStack() as stack:
            self._stack = stack
            self.secret = f"secret-{secrets.token_hex(16)}"
            self._canary = Path(tempfile.mkdtemp(prefix="groupwise-canary-"))
            stack.callback(shutil.rmtree, self._canary, ignore_errors=True)
            self._fill_canary()
            os.environ[SECRET_NAME] = self.secret
            stack.callback(os.environ.pop, SECRET_NAME, None)
            self._victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(36000)"])
            stack.callback(self._end_victim)
            self._open_ports()
            self._canary_before, self._harness_before = self._canary_now(), _harness_now()
            # Otherwise it starts with the first spawned process or shared memory, and would pass for an attack's.
            resource_tracker.ensure_running()
            self._own = frozenset(_children())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def filled_in(self, text: str) -> str:
        """`text` with this host's names and numbers for its placeholders."""
        values = {
            "SECRET_NAME": SECRET_NAME,
            "SECRET_FILE": str(self._canary / "secret"),
            "CANARY": str(self._canary),
            "PORT": str(self._ports[0].getsockname()[1]),
            "SOCKET": str(self._canary / "socket"),
            "VICTIM": str(self._victim.pid),
            "SUITE": str(os.getpid()),
        }
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        return text

    def harm(self, own_processes: Collection[int] = ()) -> list[str]:
        """What is harmed, taken or left behind, in words; waits a moment for what is just going away.

        `own_processes` are children of this process that belong here, beside those it had when the host was made.
        """
        deadline = time.monotonic() + GRACE_S
        while found := self._harm({*self._own, *own_processes}):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return found

    def _harm(self, own_processes: Collection[int]) -> list[str]:
        found = []
        if self._canary_now() != self._canary_before:
            found.append("the canary folder is changed")
        if _harness_now() != self._harness_before:
            found.append("the harness is changed")
        if self._victim.poll() is not None:
            found.append("the victim process is gone")
        if select.select(self._ports, [], [], 0)[0]:
            found.append("a port was reached")
        found += [f"process left: {name}" for name in (*left_processes(), *_strange_children(own_processes))]
        found += [f"file left: {path}" for path in left_files()]
        return found + [f"socket left: {name}" for name in left_sockets()]

    def _fill_canary(self) -> None:
        self._canary.chmod(0o777)
        for name, text in (("secret", self.secret), ("canary", "alive")):
            (self._canary / name).write_text(text)
            (self._canary / name).chmod(0o666)

    def _canary_now(self) -> dict[str, tuple[Any, ...]]:
        """Path in the canary folder -> all that may be changed of it: mode, owner, time, attributes, content."""
        found: dict[str, tuple[Any, ...]] = {}
        for path in (self._canary, *sorted(self._canary.rglob("*"))):
            stat = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path)] = (
                stat.st_mode,
                stat.st_uid,
                stat.st_mtime_ns,
                os.listxattr(path, follow_symlinks=False),
                content,
            )
        return found

    def _open_ports(self) -> None:
        """One port number over TCP and UDP, a socket in the canary folder, an abstract one, an inherited descriptor."""
        tcp = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", tcp.getsockname()[1]))
        named, abstract = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
        named.bind(str(self._canary / "socket"))
        (self._canary / "socket").chmod(0o777)
        abstract.bind(f"\0{self._canary}")
        for listener in (named, abstract):
            listener.listen()
        self._ports = (tcp, udp, named, abstract)
        for port in self._ports:
            self._stack.enter_context(port)
        leaked = self._stack.enter_context((self._canary / "secret").open("rb"))
        os.set_inheritable(leaked.fileno(), True)

    def _end_victim(self) -> None:
        self._victim.kill()
        self._victim.wait()


def left_processes() -> list[str]:
    """Command lines of processes that run under the user id of a sandbox slot that nobody holds."""
    found: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            number = path.stat().st_uid - slots.FIRST_UID
            if 0 <= number < slots.SLOTS:
                found.setdefault(number, []).append(f"{path.name} {_status(path)}")
    return [name for number, names in found.items() if not slots.in_use(number) for name in names]


def left_files() -> list[str]:
    """Files in the machine's shared folders that a sandbox's user owns or that bear the mark."""
    found = []
    for folder in SHARED_FOLDERS:
        for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
            with suppress(OSError):
                owned = 0 <= path.lstat().st_uid - slots.FIRST_UID < slots.SLOTS
                if owned or path.name.startswith(MARK):
                    found.append(str(path))
    return found


def left_sockets() -> list[str]:
    """Sockets that listen under a sandbox's user id, or whose name bears the mark."""
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for row in _lines(Path("/proc/net") / table):
            fields = row.split()
            if fields[3] in (LISTENING, UDP_UNCONNECTED) and 0 <= int(fields[7]) - slots.FIRST_UID < slots.SLOTS:
                found.append(f"{table} {fields[1]}")
    return found + [row.split()[-1] for row in _lines(Path("/proc/net/unix")) if MARK in row]


def _strange_children(own: Collection[int]) -> Iterator[str]:
    return (_status(Path("/proc") / str(pid)) for pid in _children() if pid not in own)


def _children() -> Iterator[int]:
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, path.read_text().split())


def _status(process: Path) -> str:
    """The state and the beginning of the command line."""
    with suppress(OSError, IndexError):
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        return f"{state} {(process / 'cmdline').read_text()[:120]!r}"
    return "gone"


def _harness_now() -> dict[str, tuple[int, int]]:
    """Every file of the code reward -> (size, time of its last change)."""
    folder = Path(rewards.code.__file__).parent
    stats = {str(path): path.stat() for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def _lines(table: Path) -> list[str]:
    return table.read_text().splitlines()[1:] if table.exists() else []
