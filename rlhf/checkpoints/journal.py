"""What each step of a stage trained and where it left the run, so that a resumed run trains it again without sampling.

    <root>/<stage>/<step>/rank-<rank>.rows   written by that learner rank, before each update
    <root>/<stage>/<step>/step.json          written by the driver once the step is done

A step counts when `step.json` is there and every file of rows is whole. Rows hold all that decides the bits of the
step: its tokens and log-probs in the order of ranks and micro-batches, its advantages and its weights.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rlhf.batches.packing import Share
from rlhf.batches.ragged import RolloutSequences
from rlhf.checkpoints.directories import written
from rlhf.errors import CheckpointError

STEP_FILE = "step.json"
TOKEN_BYTES = 9
"""Of one token in the rows: its id, its log-prob and its place in the loss mask."""
_ARRAYS = tuple(field.name for field in fields(RolloutSequences))
_LENGTH_BYTES, _HASH_BYTES = 8, 8

Digests = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RankUpdate:
    """One optimiser step of a rank: `advantages` and `weights` float32 [n] of the sequences it holds for it."""

    number: int
    advantages: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class RankRows:
    """What one rank trained in one rollout step: its sequences for each optimiser step, and the updates made."""

    shares: list[Share[RolloutSequences]]
    updates: list[RankUpdate]


class RankJournal:
    """The rows of one rank and step, appended to `path`; an earlier try of the step is overwritten."""

    def __init__(self, path: Path, shares: Sequence[Share[RolloutSequences]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._append(optimiser_steps=np.array(len(shares)))
        for share in shares:
            arrays = {name: getattr(share.batch, name) for name in _ARRAYS}
            self._append(counts=np.array(share.counts, np.int64), **arrays)

    def add(self, update: RankUpdate) -> None:
        """The rank is about to make `update`."""
        self._append(number=np.array(update.number), advantages=update.advantages, weights=update.weights)

    def close(self) -> None:
        self._file.close()

    def _append(self, **arrays: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        content = buffer.getbuffer()
        self._file.write(len(content).to_bytes(_LENGTH_BYTES, "little") + xxhash.xxh3_64_digest(content))
        self._file.write(content)
        # The page cache survives a killed process. A lost machine may lose the last steps, which the hashes show.
        self._file.flush()


def read_rows(path: Path) -> RankRows:
    """The rows of one rank. Raises CheckpointError where the file is missing, cut off or damaged."""
    records = _records(path)
    count = int(next(records)["optimiser_steps"])
    shares = []
    for _ in range(count):
        record = dict(next(records))
        counts = tuple(int(number) for number in record.pop("counts"))
        shares.append(Share(RolloutSequences(**record), counts))
    updates = [RankUpdate(int(r["number"]), r["advantages"], r["weights"]) for r in records]
    return RankRows(shares, updates)


def _records(path: Path) -> Iterator[dict[str, np.ndarray]]:
    for content in _frames(path):
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            yield dict(arrays)


def _frames(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while header := file.read(_LENGTH_BYTES + _HASH_BYTES):
                content = file.read(int.from_bytes(header[:_LENGTH_BYTES], "little"))
                if xxhash.xxh3_64_digest(content) != header[_LENGTH_BYTES:]:
                    raise CheckpointError(f"{path}: is cut off or damaged.")
                yield content
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read. {error}.") from error


@dataclass(frozen=True, slots=True)
class JournaledStep:
    """A step that was trained, and the run after it.

    `version` is the weight version that it made, `digests` those of each rank's masters by tensor, `machines` what
    each rank ran on, `losses` and `grad_norms` one of each optimiser step. `state` is the stage's and `record_bytes`
    the sizes of the run's records, both as in a checkpoint that were written after this step.
    """

    step: int
    version: int
    losses: Sequence[float]
    grad_norms: Sequence[float]
    digests: Sequence[Digests]
    machines: Sequence[Mapping[str, Any]]
    state: Mapping[str, Any]
    record_bytes: Mapping[str, int]


class Journal:
    """The steps of one stage, in the directory `root`. Reading and dropping are the driver's."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def directory(self, step: int) -> Path:
        """Where learner ranks write the rows of `step`."""
        return self._root / f"{step:06d}"

    def write(self, step: JournaledStep) -> None:
        """`step` is done: a resumed run will train it again instead of sampling."""
        with written(self.directory(step.step) / STEP_FILE, durable=False) as unfinished:
            unfinished.write_text(json.dumps(asdict(step)))

    def read(self, step: int) -> JournaledStep:
        """Raises CheckpointError where the step was not done or any of its rows is not whole."""
        directory = self.directory(step)
        try:
            found = JournaledStep(**json.loads((directory / STEP_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{directory / STEP_FILE}: must be the record of a step. {error}.") from error
        for rank in range(len(found.digests)):
            for _ in _frames(rows_path(directory, rank)):
                pass
        return found

    def following(self, step: int) -> tuple[JournaledStep, ...]:
        """The whole steps from `step` on, up to the first that is not."""
        found: list[JournaledStep] = []
        while (self.directory(step) / STEP_FILE).exists():
            try:
                found.append(self.read(step))
            except CheckpointError:
                break
            step += 1
        return tuple(found)

    def keep(self, steps: range) -> None:
        """Remove all other steps."""
        for path in self._root.glob("[0-9]*"):
            if int(path.name) not in steps:
                shutil.rmtree(path)


def rows_path(directory: Path, rank: int) -> Path:
    """The file of `rank` in the directory of a step."""
    return directory / f"rank-{rank:04d}.rows"


def keep_only(root: Path, stages: Mapping[str, range]) -> None:
    """Remove from the journals in `root` all but those steps of those stages."""
    for path in root.glob("*"):
        if path.name not in stages:
            shutil.rmtree(path)
    for stage, steps in stages.items():
        Journal(root / stage).keep(steps)
