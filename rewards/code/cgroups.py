"""A memory and process bound on everything a sandbox runs together, where control groups can be made (v1 or v2)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
EMPTY_DEADLINE_S = 2.0


class Cgroup:
    """Control groups of one sandbox slot. A process belongs to it once its id is written to every file of `joins`."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self.joins = tuple(str(folder / "cgroup.procs") for folder in folders)

    @classmethod
    def create(cls, number: int, memory_bytes: int, processes: int) -> Cgroup | None:
        """The group of slot `number`, empty; None where memory cannot be bounded this way."""
        group = cls([parent / f"groupwise-{number}" for parent in _parents()])
        try:
            group.remove()
            for folder in group._folders:
                folder.mkdir()
            bounded = [folder for folder in group._folders if _bound(folder, memory_bytes, processes)]
        except OSError:
            with suppress(OSError):
                group.remove()
            return None
        if not bounded:
            group.remove()
            return None
        return group

    def pids(self) -> set[int]:
        """Ids of the processes in it."""
        found: set[int] = set()
        for path in self.joins:
            with suppress(FileNotFoundError):
                found |= {int(line) for line in Path(path).read_text().split()}
        return found

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed a process in it for the bound."""
        for folder in self._folders:
            for name in ("memory.events", "memory.oom_control"):
                with suppress(FileNotFoundError):
                    counts = dict(line.split() for line in (folder / name).read_text().splitlines())
                    return int(counts.get("oom_kill", 0)) > 0
        return False

    def remove(self) -> None:
        """End what is in it and delete it; afterwards neither is there. Raises OSError when that takes too long."""
        deadline = time.monotonic() + EMPTY_DEADLINE_S
        while pids := self.pids() - {0}:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {sorted(pids)[:5]} of a sandbox do not end")
            time.sleep(0.001)
        for folder in self._folders:
            _remove_folder(folder, deadline)


def _remove_folder(folder: Path, deadline: float) -> None:
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:  # busy for a moment after its last process
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def _bound(folder: Path, memory_bytes: int, processes: int) -> bool:
    """Write the bounds the folder knows; whether memory is among them."""
    limits = {
        "memory.max": memory_bytes,
        "memory.swap.max": 0,
        "memory.limit_in_bytes": memory_bytes,
        "memory.memsw.limit_in_bytes": memory_bytes,
        "pids.max": processes,
    }
    for name, value in limits.items():
        with suppress(FileNotFoundError, PermissionError):
            (folder / name).write_text(str(value))
    return (folder / "memory.max").exists() or (folder / "memory.limit_in_bytes").exists()


def _parents() -> list[Path]:
    """Where a group for memory, and one for processes, would be made: below this process's own."""
    parents: list[Path] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers in ("memory", "pids"):
            parents.append(ROOT / controllers / inside)
        elif not controllers and (ROOT / "cgroup.controllers").exists():
            parents.append(ROOT / inside)
    return [parent for parent in parents if parent.is_dir()]
