"""Model directories in Hugging Face format: read tensor by tensor, written group by group.

Neither direction holds a whole model in memory. Reading maps the safetensors files, so a slice of a
tensor costs the pages of that slice. Writing appends each group to its shard as it arrives and
renames the finished directory into place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf.checkpoints.directories import staged, storage_errors, sync
from rlhf.errors import ConfigError
from rlhf.weight_sync.source import ParameterMeta

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their name in the header of a safetensors file."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


STATE_BYTES_PER_PARAMETER = 16
"""Weights, float32 masters and two moments of Adam: 14 in bfloat16, at most 16."""


# --- reading --------------------------------------------------------------------------------------


class ModelFiles:
    """The tensors of a model directory, by name.

    Tensors are views of memory-mapped files: copy before changing one. Raises ConfigError where the
    directory has no safetensors, or where a file is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._shards = self._open_shards()
        self.names = tuple(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shards[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._shards[name].get_slice(name).get_dtype()
        if stored not in DTYPES:
            reason = f"{name} is stored as {stored}"
            fix = "Convert the weights to BF16 or F32."
            raise ConfigError([self._problem("must hold plain tensors", reason, fix)])
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        return self._shards[name].get_tensor(name)

    def _open_shards(self) -> dict[str, Any]:
        """Tensor name -> open file. transformers, too, prefers the single file to the index."""
        if (self.directory / SINGLE_FILE).is_file():
            indexed = {}
            files = [SINGLE_FILE]
        elif (self.directory / INDEX_FILE).is_file():
            indexed = self._read_index()
            files = sorted(set(indexed.values()))
        else:
            raise ConfigError([self._without_safetensors()])
        opened: dict[str, Any] = {}
        problems: list[str] = []
        for file in files:
            try:
                opened[file] = self._open(file)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        self._check_index(indexed, opened)
        # An open file has keys() and is no mapping.
        return {name: shard for shard in opened.values() for name in shard.keys()}  # noqa: SIM118

    def _open(self, file: str) -> Any:
        path = self.directory / file
        if not path.is_file():
            reason = f"{INDEX_FILE} names {file}, which does not exist"
            rule = "must hold every file of its index"
            raise ConfigError([self._problem(rule, reason, "Download it again.")])
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            size = f"{path.stat().st_size:,} bytes"
            reason = f"{file} ({size}) cannot be read: {str(error).rstrip('.')}"
            fix = "It is truncated or damaged: download or copy it again."
            problem = self._problem("must hold whole safetensors files", reason, fix)
            raise ConfigError([problem]) from error

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file, as the index has it."""
        try:
            index = json.loads((self.directory / INDEX_FILE).read_text())["weight_map"]
            return {str(name): str(file) for name, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{INDEX_FILE} is not JSON with a weight_map ({type(error).__name__}: {error})"
            problem = self._problem("must have a readable index", reason, "Download it again.")
            raise ConfigError([problem]) from error

    def _check_index(self, indexed: Mapping[str, str], opened: Mapping[str, Any]) -> None:
        held = {file: set(shard.keys()) for file, shard in opened.items()}
        lacking = [f"{name} in {file}" for name, file in indexed.items() if name not in held[file]]
        if lacking:
            reason = f"{INDEX_FILE} promises what is not there: {few(lacking)}"
            fix = "The index and its files are of different models: download both again."
            raise ConfigError([self._problem("must hold every tensor of its index", reason, fix)])

    def _without_safetensors(self) -> str:
        rule = f"must hold {SINGLE_FILE} or {INDEX_FILE}"
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        if pickled:
            load = f"AutoModelForCausalLM.from_pretrained({str(self.directory)!r}, dtype='auto')"
            code = f"{load}.save_pretrained(NEW)"
            reason = f"It has only pickled weights ({few(pickled)}), which cannot be mapped"
            fix = f"Convert it once: {code}, then copy the tokenizer files to NEW and use NEW."
            return self._problem(rule, reason, fix)
        fix = "Point it at a directory written by save_pretrained."
        return self._problem(rule, "It has neither", fix)

    def _problem(self, rule: str, reason: str, fix: str) -> str:
        return f"model.path = {self.directory}: {rule}. {reason}. {fix}"


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def state_bytes(model: Path) -> int:
    """Bytes that the state of a learner of the model in the directory `model` takes on disk, or somewhat more.

    0 where it is no directory, such as a name that a hub knows.
    """
    if not model.is_dir():
        return 0
    files = ModelFiles(model)
    return STATE_BYTES_PER_PARAMETER * sum(torch.Size(files.shape(name)).numel() for name in files.names)


# --- writing --------------------------------------------------------------------------------------

Named = tuple[str, Tensor]
Groups = Iterator[Mapping[str, Tensor]]


def write_model(
    directory: str | Path,
    groups: Iterable[Mapping[str, Tensor]],
    metadata: Sequence[ParameterMeta],
    *,
    shard_bytes: int = SHARD_BYTES,
    save_rest: Callable[[Path], None],
) -> None:
    """Stream `groups` into safetensors shards of at most `shard_bytes` each, in a model directory.

    The tensors must come in the order of `metadata`, with its dtypes and shapes; one group is alive
    at a time. `save_rest` writes configuration and tokenizer into the directory it is given. An
    existing `directory` is replaced at the end; on any error it stays as it is, and nothing is left
    beside it.

    Drawing a group may be a collective. After an error the remaining groups are drawn and dropped,
    so that other ranks do not wait for this one. Raises StorageError where the disk is full or the
    place cannot be written, ValueError where a tensor differs from its metadata.
    """
    target = Path(directory).absolute()
    remaining = iter(groups)
    try:
        shards = plan_shards(metadata, shard_bytes)
        needed = sum(shard.file_bytes for shard in shards)
        with storage_errors(target, needed, "a model"), staged(target) as partial:
            _write_shards(partial, shards, remaining)
            if len(shards) > 1:
                _write_index(partial, shards)
            save_rest(partial)
            for path in partial.rglob("*"):
                sync(path)
    except Exception:
        for _ in remaining:
            pass
        raise


@dataclass(frozen=True)
class Shard:
    """A safetensors file that is still to be written: its header and the place of each tensor."""

    file: str
    tensors: tuple[ParameterMeta, ...]
    offsets: Mapping[str, int]
    header: bytes

    @property
    def file_bytes(self) -> int:
        return len(self.header) + sum(map(_bytes_of, self.tensors))


def plan_shards(metadata: Sequence[ParameterMeta], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Deal the tensors to files in order. One larger than `shard_bytes` has a file of its own."""
    dealt: list[list[ParameterMeta]] = [[]]
    filled = 0
    for meta in metadata:
        if dealt[-1] and filled + _bytes_of(meta) > shard_bytes:
            dealt.append([])
            filled = 0
        dealt[-1].append(meta)
        filled += _bytes_of(meta)
    if len(dealt) == 1:
        return [_shard(SINGLE_FILE, dealt[0])]
    name = f"model-{{:05d}}-of-{len(dealt):05d}.safetensors"
    return [_shard(name.format(number), tensors) for number, tensors in enumerate(dealt, start=1)]


def _shard(file: str, tensors: Sequence[ParameterMeta]) -> Shard:
    """Lay out the data: widest dtype first, so that every tensor is aligned to its element size."""
    offsets: dict[str, int] = {}
    position = 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for meta in sorted(tensors, key=lambda meta: -meta.dtype.itemsize):
        end = position + _bytes_of(meta)
        entries[meta.name] = {
            "dtype": DTYPE_NAMES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [position, end],
        }
        offsets[meta.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, tuple(tensors), offsets, header)


def _bytes_of(meta: ParameterMeta) -> int:
    return torch.Size(meta.shape).numel() * meta.dtype.itemsize


def _write_index(directory: Path, shards: Sequence[Shard]) -> None:
    weight_map = {meta.name: shard.file for shard in shards for meta in shard.tensors}
    total = sum(_bytes_of(meta) for shard in shards for meta in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_shards(directory: Path, shards: Sequence[Shard], groups: Groups) -> None:
    tensors = _in_order(groups)
    for shard in shards:
        with (directory / shard.file).open("wb") as file:
            file.write(shard.header)
            for meta in shard.tensors:
                _write_tensor(file, shard, meta, next(tensors, None))
            file.flush()
            # Now rather than at the end: other ranks may be waiting for this one in a collective.
            os.fsync(file.fileno())
    surplus = next(tensors, None)
    if surplus is not None:
        raise ValueError(f"{surplus[0]}: not in the metadata of the model that is being written")


def _in_order(groups: Groups) -> Iterator[tuple[str, Tensor]]:
    for group in groups:
        yield from group.items()
        del group  # before the next one is made


def _write_tensor(file: BinaryIO, shard: Shard, meta: ParameterMeta, found: Named | None) -> None:
    if found is None or found[0] != meta.name:
        instead = "the end of the stream" if found is None else found[0]
        raise ValueError(f"{meta.name}: expected next, got {instead}")
    tensor = found[1]
    if (tensor.dtype, tuple(tensor.shape)) != (meta.dtype, tuple(meta.shape)):
        differs = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{meta.name}: {differs}, but its metadata says {meta.dtype} {meta.shape}")
    values = tensor.detach().cpu().contiguous()
    file.seek(len(shard.header) + shard.offsets[meta.name])
    file.write(values.view(-1).view(torch.uint8).numpy().data)
