"""A place for one running sandbox on this machine: its own user id and control group, shared by no other process.

Slots are numbered files under a lock that the kernel releases when its holder ends, however it ends; so what a crashed
holder left behind under the number is known to be nobody's and is cleared away by the next one.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import WorkerLostError

SLOTS = 400
FIRST_UID = 60_706  # up to 61183: what systemd's table of user ids leaves unused; below 65536, as containers map


@contextmanager
def slot() -> Iterator[int]:
    """The number of a slot that is nobody else's meanwhile. Raises WorkerLostError when all are taken."""
    folder = _folder()
    for number in range(SLOTS):
        fd = os.open(folder / str(number), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        try:
            yield number
        finally:
            os.close(fd)
        return
    raise WorkerLostError(f"all {SLOTS} sandbox slots of this machine are in use: lower rewards.processes")


def uid_of(number: int) -> int | None:
    """The user id of the slot; None where this process may not change its own."""
    return FIRST_UID + number if os.geteuid() == 0 else None


def in_use(number: int) -> bool:
    """Whether a sandbox runs in the slot now."""
    path = _folder() / str(number)
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _folder() -> Path:
    base = Path("/run") if os.access("/run", os.W_OK) else Path(tempfile.gettempdir())
    folder = base / f"groupwise-sandbox-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        rule = f"must be a folder of user {os.geteuid()} alone"
        raise WorkerLostError(f"{folder}: {rule}. Someone else could hold its locks. Remove it.")
    return folder
