"""Results that are worth keeping between runs, in files named by what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rlhf.checkpoints.directories import written
from rlhf.samples import TokenizedExample

_CHUNK_BYTES = 1 << 24


def digest(*parts: object) -> str:
    """32 hexadecimal digits that depend on all `parts`."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def model_digest(model: Path) -> str:
    """Changes with any bit of the weights or the configuration in the folder `model`; a hub name stands for itself."""
    if not model.is_dir():
        return str(model)
    whole = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json"):
            whole.update(file.name.encode())
            with file.open("rb") as content:
                while chunk := content.read(_CHUNK_BYTES):
                    whole.update(chunk)
    return whole.hexdigest()[:32]


def examples_digest(examples: Iterable[TokenizedExample]) -> str:
    """Changes with any token of `examples`, with which of them are trained, and with their order."""
    whole = hashlib.sha256()
    for example in examples:
        whole.update(len(example.token_ids).to_bytes(8, "little"))
        whole.update(np.ascontiguousarray(example.token_ids, np.int32).tobytes())
        whole.update(np.packbits(example.loss_mask).tobytes())
    return whole.hexdigest()[:32]


def write_ragged(path: Path, rows: Iterable[np.ndarray]) -> None:
    """float32 rows of different lengths are in `path`, whole or not at all."""
    rows = list(rows)
    with written(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, values=np.concatenate(rows), lengths=np.array([len(row) for row in rows]))


def read_ragged(path: Path) -> list[np.ndarray]:
    with np.load(path) as stored:
        return np.split(stored["values"], np.cumsum(stored["lengths"])[:-1])
