"""The folder of a private Ray: its run holds a lock in it, so that the next run can clear away what a kill left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

PREFIX = "groupwise-"
_LOCK = "lock"


class SessionFolder:
    """A new folder directly below `parent`: Ray's sockets in it may have paths of 107 bytes and no more."""

    def __init__(self, parent: Path = Path("/tmp")) -> None:
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # It has its name only once it is locked: a sweep never meets one that is not.
        unnamed = self.path / f".{_LOCK}"
        self._lock = unnamed.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep(parent: Path) -> list[Path]:
    """Remove the folders of this user's runs that do not live any more, and return them."""
    removed = []
    for folder in parent.glob(f"{PREFIX}*"):
        lock = _lock_of_the_dead(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()
            removed.append(folder)
    return removed


def _lock_of_the_dead(folder: Path) -> IO[str] | None:
    """The lock of a folder whose run has ended, held; None where the run lives or the folder is not ours."""
    try:
        if folder.stat().st_uid != os.getuid():
            return None
        lock = (folder / _LOCK).open("r+")
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock
