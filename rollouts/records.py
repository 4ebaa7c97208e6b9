"""Files and data sets: records -> prompts, each one checked before the run starts.

Every broken rule becomes one line that names the file, the line or row, the field and what was found; a load reports up
to ten of them at once and the total.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import HuggingFaceSource, JsonlSource, ParquetSource
from rlhf.errors import ConfigError, DataError, did_you_mean
from rlhf.samples import Prompt

FileSource = JsonlSource | ParquetSource | HuggingFaceSource

ROLES = ("system", "user", "assistant", "tool")
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_SHOWN_PROBLEMS = 10
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Completion:
    reasoning: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """`completion` is None where the source names no completion column."""

    prompt: Prompt
    completion: Completion | None


class BrokenRecord(Exception):
    """One rule that one record breaks; becomes a line of the DataError."""


@dataclass(frozen=True, slots=True)
class _Row:
    """`values` as read, or the problem that kept them from being read."""

    number: int
    values: Mapping[str, Any] | BrokenRecord


def load_records(config: FileSource) -> list[Record]:
    """All records of the source (the first `limit` of them), in file order, at least one.

    Raises ConfigError where the column settings cannot work, DataError where the file or its records break a rule.
    """
    parser = _RecordParser(config)
    unit, rows = _rows(config)
    records, problems = [], []
    for row in itertools.islice(rows, config.limit):
        try:
            if isinstance(row.values, BrokenRecord):
                raise row.values
            records.append(parser.record(row.number, row.values))
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
    shown = problems[:_SHOWN_PROBLEMS]
    count = f"{len(problems)} of {total} records" if total > 1 else "the only record"
    more = f" (the first {len(shown)} are shown)" if len(shown) < len(problems) else ""
    return "\n".join([f"{path}: {count} cannot be used{more}:", *(f"  - {problem}" for problem in shown)])


# --- reading ----------------------------------------------------------------------------------------------------------


def _rows(config: FileSource) -> tuple[str, Iterator[_Row]]:
    """What a record is called in messages, and the records, numbered from 1."""
    if isinstance(config, JsonlSource):
        return "line", _jsonl_rows(_existing_file(config.path))
    if isinstance(config, ParquetSource):
        return "row", _parquet_rows(_existing_file(config.path))
    return "row", _dataset_rows(config)


def _existing_file(path: str) -> Path:
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
        found = "The line is blank" if not line.strip() else f"{error.msg} at column {error.colno}: {_shown(line)}"
        return BrokenRecord(f"must be one JSON object. {found}. Correct or remove the line.")
    except BrokenRecord as problem:
        return problem
    if isinstance(values, dict):
        return values
    return BrokenRecord(f"must be one JSON object. Found {_shown(values)}. Write one object on each line.")


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


def _dataset_rows(config: HuggingFaceSource) -> Iterator[_Row]:
    for number, row in enumerate(_load_dataset(config), start=1):
        yield _Row(number, row)


def _load_dataset(config: HuggingFaceSource) -> Iterable[Mapping[str, Any]]:
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


def _split(loaded: Mapping[str, Iterable[Mapping[str, Any]]], config: HuggingFaceSource) -> Iterable[Mapping[str, Any]]:
    if config.split not in loaded:
        hint = did_you_mean(config.split, loaded)
        raise DataError(f"split = {config.split}: must be a split of {config.path}. It has no such split. {hint}")
    return loaded[config.split]


# --- records ----------------------------------------------------------------------------------------------------------


class _RecordParser:
    """Turns the values of one record into a Record by the columns of the source."""

    def __init__(self, config: FileSource) -> None:
        problems = _column_problems(config)
        if problems:
            raise ConfigError(problems)
        self._config = config
        self._columns = config.columns
        self._name = Path(config.path).name.split(".")[0] or config.path
        self._answer_pattern = re.compile(config.answer_pattern) if config.answer_pattern else None

    def record(self, number: int, values: Mapping[str, Any]) -> Record:
        """Raises BrokenRecord for the first rule the record breaks."""
        prompt = Prompt(
            prompt_id=f"{self._name}:{number}",
            messages=self._messages(values),
            answer=self._answer(values),
            reward=self._reward(values),
            metadata={column: _column(values, column) for column in self._columns.metadata},
        )
        return Record(prompt, self._completion(values))

    def _messages(self, values: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
        system = self._config.system_prompt
        head = ({"role": "system", "content": system},) if system else ()
        if self._columns.prompt is not None:
            return (*head, {"role": "user", "content": _text(values, self._columns.prompt)})
        column = self._columns.messages
        assert column is not None
        messages = parse_messages(_column(values, column), column)
        if head and messages[0]["role"] == "system":
            rule = "must not begin with a system turn"
            raise BrokenRecord(f"{_field(column)} {rule}. system_prompt is set too. Remove one of the two.")
        return (*head, *messages)

    def _answer(self, values: Mapping[str, Any]) -> str:
        column = self._columns.answer
        if column is None:
            return ""
        answer = _answer_text(_column(values, column), column)
        if self._answer_pattern is None:
            return answer
        matches = list(self._answer_pattern.finditer(answer))
        if not matches or matches[-1].group(1) is None:
            rule = f"must match answer_pattern {self._answer_pattern.pattern!r}"
            raise BrokenRecord(f"{_field(column)} {rule}. Found {_shown(answer)}. Correct the pattern or the record.")
        return matches[-1].group(1).strip()

    def _reward(self, values: Mapping[str, Any]) -> str:
        column = self._columns.reward
        name = values.get(column) if column is not None else None
        if name is None and self._config.reward is not None:
            return self._config.reward
        if column is None:
            raise AssertionError("the column settings were checked: there is a reward or a reward column")
        if name is None:
            hint = _missing_hint(values, column)
            raise BrokenRecord(f"{_field(column)} must name the reward. {hint} Add it, or set reward for all records.")
        if not isinstance(name, str) or not name:
            raise BrokenRecord(f"{_field(column)} must be the name of a reward. Found {_shown(name)}. Write a name.")
        return name

    def _completion(self, values: Mapping[str, Any]) -> Completion | None:
        column = self._columns.completion
        return None if column is None else split_completion(_text(values, column), column)


def _column_problems(config: FileSource) -> list[str]:
    columns = config.columns
    problems = []
    if (columns.messages is None) == (columns.prompt is None):
        given = "neither" if columns.messages is None else "both"
        fix = "Set the one your records have and leave the other null."
        problems.append(f"columns = {given} of messages and prompt: exactly one must be set. {fix}")
    if columns.reward is None and config.reward is None:
        reason = "Nothing says how an answer is verified"
        problems.append(
            f"reward = null: must be set where columns.reward is not. {reason}. Name a reward, such as math."
        )
    if config.answer_pattern is not None:
        problems.extend(_pattern_problems(config.answer_pattern))
        if columns.answer is None:
            fix = "Set columns.answer or remove the pattern."
            problems.append(f"answer_pattern = {config.answer_pattern}: needs columns.answer. It is null. {fix}")
    return problems


def _pattern_problems(pattern: str) -> list[str]:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"answer_pattern = {pattern}: must be a regular expression. {error}. Correct it."]
    if groups:
        return []
    reason = "Group 1 is the answer and there is none"
    return [f"answer_pattern = {pattern}: must have a group. {reason}. Put the answer's part in parentheses."]


def parse_messages(value: Any, column: str) -> tuple[Mapping[str, str], ...]:
    """Checked chat messages: known roles, text contents, a system turn only in front, a non-empty user turn last."""
    if not isinstance(value, list | tuple) or not value:
        fix = 'Write [{"role": "user", "content": "..."}]'
        raise BrokenRecord(f"{_field(column)} must be a non-empty list of messages. Found {_shown(value)}. {fix}.")
    messages = tuple(_message(message, f"{column}[{index}]", index) for index, message in enumerate(value))
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        fix = "Move a worked answer to a completion column, or end with the question"
        raise BrokenRecord(f'{_field(column)} must end with a user turn. The last turn is from "{role}". {fix}.')
    if not messages[-1]["content"].strip():
        raise BrokenRecord(
            f"{_field(column)} must not end with an empty prompt. Found {_shown('')}. Remove the record."
        )
    return messages


def _message(message: Any, name: str, index: int) -> Mapping[str, str]:
    if not isinstance(message, Mapping):
        raise BrokenRecord(f"{_field(name)} must be a message. Found {_shown(message)}. Give it a role and a content.")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            found = f"Found {_shown(message[key])}" if key in message else "It has none"
            raise BrokenRecord(f"{_field(f'{name}.{key}')} must be text. {found}. Write the {key} as text.")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        fix = "Remove it, or move it to a metadata column"
        raise BrokenRecord(f"{_field(f'{name}.{extra[0]}')} is not read. A message is a role and a content. {fix}.")
    role = message["role"]
    if role not in ROLES or (role == "system" and index):
        rule = f"must be one of {', '.join(ROLES)}, system only for the first message"
        raise BrokenRecord(f"{_field(f'{name}.role')} {rule}. Found {_shown(role)}. Correct the role.")
    return {"role": role, "content": message["content"]}


def split_completion(text: str, column: str) -> Completion:
    """`<think>reasoning</think>content` in two parts, without the line breaks around them; no block, no reasoning."""
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if not opened and not closed:
        return Completion("", text)
    body = text.lstrip()
    if opened != 1 or closed != 1 or not body.startswith(THINK_OPEN) or THINK_CLOSE not in body:
        rule = f"may have one {THINK_OPEN}...{THINK_CLOSE} block, at its beginning"
        found = f"{opened} opening and {closed} closing tags"
        raise BrokenRecord(f"{_field(column)} {rule}. Found {found} in {_shown(text)}. Correct the tags.")
    reasoning, content = body.removeprefix(THINK_OPEN).split(THINK_CLOSE)
    if not content.strip():
        fix = "Add the answer after it"
        raise BrokenRecord(f"{_field(column)} must have an answer. Nothing follows {THINK_CLOSE}. {fix}.")
    return Completion(reasoning.strip("\r\n"), content.lstrip("\r\n"))


def _column(values: Mapping[str, Any], column: str) -> Any:
    if column not in values:
        raise BrokenRecord(
            f"{_field(column)} must be there. {_missing_hint(values, column)} Correct columns or the record."
        )
    return values[column]


def _text(values: Mapping[str, Any], column: str) -> str:
    value = _column(values, column)
    if not isinstance(value, str) or not value.strip():
        raise BrokenRecord(
            f"{_field(column)} must be text that is not empty. Found {_shown(value)}. Correct the record."
        )
    return value


def _answer_text(value: Any, column: str) -> str:
    """Text as it is; a finite number as Python writes it."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    rule = "must be text that is not empty, or a finite number"
    raise BrokenRecord(f"{_field(column)} {rule}. Found {_shown(value)}. Correct the record.")


def _field(name: str) -> str:
    return f'field "{name}"'


def _missing_hint(values: Mapping[str, Any], column: str) -> str:
    if column in values:
        return "It is null."
    return f"The record has no such field. {did_you_mean(column, values)}"


def _shown(value: Any) -> str:
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else repr(value)
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return cut if isinstance(value, bytes) else f"{cut} ({type(value).__name__})"
