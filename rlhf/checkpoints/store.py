"""The checkpoints of a run on disk: each a directory that appears whole, named by a manifest of all its files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlhf.checkpoints.directories import staged, storage_errors, sync
from rlhf.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its manifest has it. `files`: size in bytes and XXH3 of each, by path below `path`."""

    path: Path
    state: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    def check_sizes(self) -> None:
        """Raises CheckpointError for the first file that is missing or has another size."""
        for name, (size, _) in self.files.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != size:
                found = f"{file.stat().st_size:,} bytes" if file.is_file() else "no such file"
                raise CheckpointError(f"{file}: must have {size:,} bytes, as its manifest says. Found: {found}.")

    def check_contents(self) -> None:
        """Raises CheckpointError for the first file whose bytes are not those that were written."""
        self.check_sizes()
        for name, (_, expected) in self.files.items():
            if _file_digest(self.path / name) != expected:
                raise CheckpointError(f"{self.path / name}: has other bytes than were written. The disk is at fault.")


class CheckpointStore:
    """Checkpoints below `root`, numbered from 1 on; the newest `keep` stay. For one writing process at a time."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self._keep = keep
        # A crash in mid-write leaves a hidden directory behind, and nothing else.
        for unfinished in root.glob(".*-*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def write(self, label: str, state: Mapping[str, Any], needed: int, fill: Callable[[Path], None]) -> Checkpoint:
        """Publish a checkpoint with what `fill` puts into the directory it is given: about `needed` bytes.

        `state` is JSON. Raises StorageError where the disk is full; older checkpoints are then as they were.
        """
        number = max((_number(path) for path in self._paths()), default=0) + 1
        target = self.root / f"{number:06d}-{label}"
        with storage_errors(target, needed, "a checkpoint"), staged(target) as partial:
            fill(partial)
            paths = sorted(path for path in partial.rglob("*") if path.is_file())
            files = {str(p.relative_to(partial)): (p.stat().st_size, _file_digest(p)) for p in paths}
            manifest = {"format": FORMAT, "state": state, "files": files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in partial.rglob("*"):
                sync(path)
        self._drop_old()
        return Checkpoint(target, state, files)

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files are all as they were written; `report` is told of those passed over."""
        for path in reversed(self._paths()):
            try:
                found = read_checkpoint(path)
                found.check_contents()
            except CheckpointError as error:
                report(f"{error} An older checkpoint is taken.")
            else:
                return found
        return None

    def journaled_steps(self) -> dict[str, range]:
        """For each stage the steps that a run may have to train again when it goes on from one of the checkpoints."""
        first: dict[str, int] = {}
        for checkpoint in self.all():
            first.setdefault(checkpoint.state["stage"], checkpoint.state["step"])
        return {stage: range(step, sys.maxsize) for stage, step in first.items()}

    def all(self) -> Iterator[Checkpoint]:
        """The checkpoints, oldest first, their files unchecked."""
        return map(read_checkpoint, self._paths())

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.root.glob("[0-9]*-*") if path.is_dir())

    def _drop_old(self) -> None:
        for path in self._paths()[: -self._keep]:
            shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, its files unchecked. Raises CheckpointError where it has no manifest of this format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: is of format {manifest['format']}; this program reads format {FORMAT}.")
        files = {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        return Checkpoint(path, manifest["state"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: must be the manifest of a checkpoint. {error}.") from error


def _number(path: Path) -> int:
    return int(path.name.split("-", 1)[0])


def _file_digest(path: Path) -> str:
    whole = xxhash.xxh3_64()
    for chunk in _chunks(path):
        whole.update(chunk)
    return whole.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
