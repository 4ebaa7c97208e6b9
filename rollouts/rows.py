"""Files and data sets: row after row, each with the number a message about it needs, and the wording of those messages.

Every broken rule becomes one line that names the file, the line or row, the field and what was found; a load reports up
to ten of them at once and the total.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import HuggingFaceSource, JsonlSource, ParquetSource, PreferenceFile
from rlhf.errors import DataError, did_you_mean

FileSource = JsonlSource | ParquetSource | HuggingFaceSource
RowSource = FileSource | PreferenceFile
_DataSet = HuggingFaceSource | PreferenceFile

Parsed = TypeVar("Parsed")

_SHOWN_PROBLEMS = 10
_SHOWN_CHARACTERS = 60


class BrokenRecord(Exception):
    """One rule that one record breaks; becomes a line of the DataError."""


def read_records(config: RowSource, parse: Callable[[int, Mapping[str, Any]], Parsed]) -> list[Parsed]:
    """What `parse(number, values)` makes of each record (the first `limit`), in file order, at least one.

    `number` counts from 1. Raises DataError where the file, or a record by raising BrokenRecord, breaks a rule.
    """
    unit, rows = _rows(config)
    records: list[Parsed] = []
    problems: list[str] = []
    for row in itertools.islice(rows, config.limit):
        try:
            if isinstance(row.values, BrokenRecord):
                raise row.values
            records.append(parse(row.number, row.values))
        except BrokenRecord as problem:
            problems.append(f"{config.path}, {unit} {row.number}, {problem}")
    if problems:
        raise DataError(_report(config.path, problems, len(records) + len(problems)))
    if not records:
        raise DataError(
            f"path = {config.path}: must hold at least one record. It is empty. Give a source with records."
        )
    return records


def _report(path: str, problems: list[str], total: int) -> str:
    first = problems[:_SHOWN_PROBLEMS]
    count = f"{len(problems)} of {total} records" if total > 1 else "the only record"
    more = f" (the first {len(first)} are shown)" if len(first) < len(problems) else ""
    return "\n".join([f"{path}: {count} cannot be used{more}:", *(f"  - {problem}" for problem in first)])


def source_name(config: RowSource) -> str:
    """The file's name without its endings: the first part of the ids of its records."""
    return Path(config.path).name.split(".")[0] or config.path


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """`values` as read, or the problem that kept them from being read."""

    number: int
    values: Mapping[str, Any] | BrokenRecord


def _rows(config: RowSource) -> tuple[str, Iterator[_Row]]:
    """What a record is called in messages, and the records, numbered from 1."""
    if config.kind == "jsonl":
        return "line", _jsonl_rows(existing_file(config.path))
    if config.kind == "parquet":
        return "row", _parquet_rows(existing_file(config.path))
    return "row", _dataset_rows(config)


def existing_file(path: str) -> Path:
    """The file at `path`. Raises DataError, with the nearest name there is, where there is none."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    neighbours = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    hint = did_you_mean(file.name, neighbours) if neighbours else f"There is no directory {file.parent} either."
    rule = "must be an existing file"
    raise DataError(f"path = {path}: {rule}. There is none at {file.resolve()}. Correct the path. {hint}")


def _jsonl_rows(file: Path) -> Iterator[_Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield _Row(number, _parse_line(line))


def _parse_line(line: bytes) -> Mapping[str, Any] | BrokenRecord:
    try:
        values = json.loads(line.decode("utf-8").rstrip("\r\n"), object_pairs_hook=_object_without_repeats)
    except UnicodeDecodeError as error:
        return BrokenRecord(f"must be UTF-8. Byte {error.start + 1} of the line is not. Convert the file to UTF-8.")
    except json.JSONDecodeError as error:
        found = "The line is blank" if not line.strip() else f"{error.msg} at column {error.colno}: {shown(line)}"
        return BrokenRecord(f"must be one JSON object. {found}. Correct or remove the line.")
    except BrokenRecord as problem:
        return problem
    if _has_half_character(line, values):
        return BrokenRecord("must be text. A \\ud... escape is one half of a character. Correct or remove the line.")
    if isinstance(values, dict):
        return values
    return BrokenRecord(f"must be one JSON object. Found {shown(values)}. Write one object on each line.")


def _has_half_character(line: bytes, values: Any) -> bool:
    """Whether an escape made a lone surrogate, which JSON allows and no tokenizer takes."""
    if b"\\ud" not in line.lower():
        return False
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise BrokenRecord(f'field "{repeated}" must occur once in an object. It occurs twice. Remove one.')
    return values


def _parquet_rows(file: Path) -> Iterator[_Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        fix = "Write it anew, or set kind to jsonl if it is one."
        raise DataError(f"path = {file}: must be a Parquet file. It cannot be read: {error} {fix}") from error
    with table:
        values = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from (_Row(number, row) for number, row in enumerate(values, start=1))


def _dataset_rows(config: _DataSet) -> Iterator[_Row]:
    for number, row in enumerate(_load_dataset(config), start=1):
        yield _Row(number, row)


def _load_dataset(config: _DataSet) -> Iterable[Mapping[str, Any]]:
    """A data set saved with `save_to_disk`, else whatever `load_dataset` makes of the path or hub name."""
    import datasets

    local = Path(config.path).expanduser()
    try:
        if any((local / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(local))
            return _split(loaded, config) if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(config.path, config.name, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        name = " ".join(part for part in (config.path, config.name, f"split {config.split}") if part)
        rule = "must be a data set that can be loaded, local or on the hub"
        fix = "Check path, name and split, and the network if it is on the hub"
        raise DataError(f"path = {config.path}: {rule}. Loading {name} failed: {error}. {fix}.") from error


def _split(loaded: Mapping[str, Iterable[Mapping[str, Any]]], config: _DataSet) -> Iterable[Mapping[str, Any]]:
    if config.split not in loaded:
        hint = did_you_mean(config.split, loaded)
        raise DataError(f"split = {config.split}: must be a split of {config.path}. It has no such split. {hint}")
    return loaded[config.split]


# --- fields -----------------------------------------------------------------------------------------------------------


def column_of(values: Mapping[str, Any], column: str) -> Any:
    """The value as read. Raises BrokenRecord, with the nearest name there is, where the record has no such field."""
    if column not in values:
        raise BrokenRecord(
            f"{field_name(column)} must be there. {missing_hint(values, column)} Correct columns or the record."
        )
    return values[column]


def text_of(values: Mapping[str, Any], column: str) -> str:
    """Text that is not empty, else BrokenRecord."""
    value = column_of(values, column)
    if not isinstance(value, str) or not value.strip():
        raise BrokenRecord(
            f"{field_name(column)} must be text that is not empty. Found {shown(value)}. Correct the record."
        )
    return value


def field_name(name: str) -> str:
    return f'field "{name}"'


def missing_hint(values: Mapping[str, Any], column: str) -> str:
    if column in values:
        return "It is null."
    return f"The record has no such field. {did_you_mean(column, values)}"


def shown(value: Any) -> str:
    """The beginning of a value with its type, for messages."""
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else repr(value)
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return cut if isinstance(value, bytes) else f"{cut} ({type(value).__name__})"
