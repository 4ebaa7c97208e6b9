"""Directories and files that appear whole or not at all, also when two processes write the same."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import StorageError

_REASONS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EACCES: "Permission is denied",
    errno.EPERM: "The operation is not permitted",
    errno.EROFS: "The file system is read-only",
    errno.ENOTDIR: "A part of the path is a file",
    errno.EEXIST: "A part of the path is a file",
    errno.EIO: "The disk reports an input/output error",
}
"""Errors that are the fault of the place. Others, such as a lost connection, are not."""


@contextmanager
def storage_errors(target: Path, needed: int, what: str) -> Iterator[None]:
    """Check that `needed` bytes are free; turn errors of the disk in the block to StorageError.

    `what` goes there, e.g. "a model".
    """
    if target.exists() and not target.is_dir():
        raise _storage_error(target, needed, what, _REASONS[errno.ENOTDIR])
    if _free_bytes(target) < needed:
        raise _storage_error(target, needed, what, _REASONS[errno.ENOSPC])
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise _storage_error(target, needed, what, f"{_REASONS[error.errno]} ({error})") from error


def _storage_error(target: Path, needed: int, what: str, reason: str) -> StorageError:
    free = _free_bytes(target) / 2**30
    space = f"{needed / 2**30:,.2f} GiB are needed and {free:,.2f} GiB are free"
    fix = "Free space there, or choose a directory on another disk that this user may write."
    return StorageError(f"{target}: {what} must be written here. {reason}; {space}. {fix}")


def _free_bytes(target: Path) -> int:
    """Free space of the file system that `target` is on, or will be."""
    existing = next(path for path in (target, *target.parents) if path.is_dir())
    return shutil.disk_usage(existing).free


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Make a directory that becomes `target` when the block ends, and is removed when it raises."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        # mkdtemp made it private; other users' workers may have to read it.
        partial.chmod(0o755)
        sync(partial)
        _replace(partial, target)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def written(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """The path of a file to write, which becomes `target` when the block ends, and is removed when it raises.

    If it is `durable`, it is on the disk then. Else it may be lost with the machine, not with the process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)  # mkstemp made it private
        if durable:
            sync(partial)
        partial.replace(target)
        if durable:
            sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _replace(new: Path, target: Path) -> None:
    """Rename `new` to `target`. What was there is moved aside, and back if the rename fails."""
    if not target.exists():
        new.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        old = target.rename(aside / target.name)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the file, or the entries of the directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
