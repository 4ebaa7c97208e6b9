"""Preference pairs and groups in files: what a collect stage writes and reads back, and records that people bring.

A collect stage's Parquet file has a readable half (prompt, completions, rewards) and the token ids as they were
sampled: nothing is tokenised twice. Records of people are text and are rendered here, each one checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.config import PreferenceFile
from rlhf.errors import DataError
from rlhf.preferences import Selected
from rlhf.samples import PreferenceGroup, PreferencePair, Prompt, RenderedPrompt, TokenizedExample
from rollouts.records import (
    Completion,
    Messages,
    parse_message,
    parse_messages,
    split_completion,
    user_turn,
    with_system,
)
from rollouts.rendering import Renderer
from rollouts.rows import BrokenRecord, existing_file, field_name, missing_hint, read_records, shown, source_name

if TYPE_CHECKING:
    import pyarrow

SIDES = ("chosen", "rejected")
FORMAT_KEY, PAIRS, GROUPS = b"groupwise.preferences", b"pairs 1", b"groups 1"

PAIR_SHAPE, GROUP_SHAPE = "chosen and rejected", "completions and rewards"

_ROWS_AT_ONCE = 256

_PAIR_COLUMNS = {
    "completions": "{}",
    "rewards": "{}_reward",
    "tasks": "{}_task",
    "parts": "{}_parts",
    "completion_tokens": "{}_completion_tokens",
    "sample_ids": "{}_sample_id",
    "token_ids": "{}_token_ids",
    "loss_masks": "{}_loss_mask",
}
"""What a group has a list of -> the two columns of a pair, for chosen and rejected."""


# --- the file of a collect stage --------------------------------------------------------------------------------------


def write_selected(path: Path, records: Sequence[Selected]) -> None:
    """A Parquet file with one row for each record, complete or not there at all.

    The records are all pairs or all groups, at least one: ValueError otherwise.
    """
    import pyarrow
    from pyarrow import parquet

    kinds = {type(record.unit) for record in records}
    if len(kinds) != 1:
        raise ValueError("a preference file holds pairs or groups, at least one record and not both kinds")
    schema = _schema(pairs=kinds == {PreferencePair})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with parquet.ParquetWriter(unfinished, schema) as writer:
        for start in range(0, len(records), _ROWS_AT_ONCE):
            rows = [_row(record) for record in records[start : start + _ROWS_AT_ONCE]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    unfinished.replace(path)


def read_selected(path: Path) -> list[Selected]:
    """The records of `write_selected`, with bit-equal tokens. Raises DataError for any other file."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(existing_file(str(path)))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"path = {path}: must be a Parquet file. It cannot be read: {error} Collect anew.") from error
    with file:
        expected = {PAIRS: _schema(pairs=True), GROUPS: _schema(pairs=False)}.get(_format(file))
        if expected is None or not expected.equals(file.schema_arrow):
            reason = "Its columns are others"
            fix = "Give it to a preference stage as kind: parquet, or collect anew"
            raise DataError(f"path = {path}: must be the file of a collect stage. {reason}. {fix}.")
        batches = file.iter_batches(batch_size=_ROWS_AT_ONCE)
        return [_selected(row) for batch in batches for row in batch.to_pylist()]


def _format(file: pyarrow.parquet.ParquetFile) -> bytes:
    return (file.schema_arrow.metadata or {}).get(FORMAT_KEY, b"")


def _schema(*, pairs: bool) -> pyarrow.Schema:
    import pyarrow as pa

    types = {
        "completions": pa.string(),
        "rewards": pa.float64(),
        "tasks": pa.float64(),
        "parts": pa.map_(pa.string(), pa.float64()),
        "completion_tokens": pa.int32(),
        "sample_ids": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "loss_masks": pa.list_(pa.bool_()),
    }
    common = [("id", pa.string()), ("prompt_id", pa.string()), ("prompt", pa.string()), ("reasoning_mode", pa.bool_())]
    if pairs:
        columns = [(_PAIR_COLUMNS[name].format(side), kind) for name, kind in types.items() for side in SIDES]
    else:
        columns = [(name, pa.list_(kind)) for name, kind in types.items()]
    return pa.schema([*common, *columns], metadata={FORMAT_KEY: PAIRS if pairs else GROUPS})


def _row(record: Selected) -> dict[str, Any]:
    unit = record.unit
    examples = _examples(unit)
    lists: dict[str, Sequence[Any]] = {
        "completions": record.completions,
        "rewards": record.rewards,
        "tasks": record.tasks,
        "parts": [list(parts.items()) for parts in record.parts],
        "completion_tokens": record.completion_tokens,
        "sample_ids": record.sample_ids,
        "token_ids": [example.token_ids for example in examples],
        "loss_masks": [example.loss_mask for example in examples],
    }
    common = {
        "id": unit.pair_id if isinstance(unit, PreferencePair) else unit.group_id,
        "prompt_id": record.prompt_id,
        "prompt": record.prompt,
        "reasoning_mode": record.reasoning_mode,
    }
    if isinstance(unit, PreferenceGroup):
        return {**common, **{name: list(values) for name, values in lists.items()}}
    sides = {
        _PAIR_COLUMNS[name].format(side): value
        for name, values in lists.items()
        for side, value in zip(SIDES, values, strict=True)
    }
    return {**common, **sides}


def _examples(unit: PreferencePair | PreferenceGroup) -> tuple[TokenizedExample, ...]:
    return (unit.chosen, unit.rejected) if isinstance(unit, PreferencePair) else unit.completions


def _selected(row: Mapping[str, Any]) -> Selected:
    pair = "chosen" in row
    lists = {
        name: [row[column.format(side)] for side in SIDES] if pair else row[name]
        for name, column in _PAIR_COLUMNS.items()
    }
    examples = tuple(
        TokenizedExample(np.array(token_ids, dtype=np.int32), np.array(loss_mask, dtype=bool))
        for token_ids, loss_mask in zip(lists["token_ids"], lists["loss_masks"], strict=True)
    )
    rewards = tuple(lists["rewards"])
    return Selected(
        unit=PreferencePair(row["id"], *examples) if pair else PreferenceGroup(row["id"], examples, rewards),
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        reasoning_mode=row["reasoning_mode"],
        sample_ids=tuple(lists["sample_ids"]),
        completions=tuple(lists["completions"]),
        rewards=rewards,
        tasks=tuple(lists["tasks"]),
        parts=tuple(dict(parts) for parts in lists["parts"]),
        completion_tokens=tuple(lists["completion_tokens"]),
    )


# --- records of people ------------------------------------------------------------------------------------------------


def load_preferences(
    config: PreferenceFile, renderer: Renderer, reasoning_mode: bool
) -> list[PreferencePair] | list[PreferenceGroup]:
    """All records of the source (the first `limit`), in file order, rendered in `reasoning_mode`, at least one.

    A record has `prompt` (text or chat messages) or `messages`, and either `chosen` and `rejected` or `completions` and
    `rewards`; all records of a source have the same of the two. Chosen and rejected are text, one assistant message in
    a list, or whole conversations that begin with the prompt, in which case the prompt may be left out. Where `prompt`
    is text and `messages` a chat that ends with it, the chat is the prompt. The file of a collect stage is taken token
    by token, in the mode it was sampled in. Raises DataError with every record that breaks a rule.
    """
    if config.kind == "parquet" and _is_collected(existing_file(config.path)):
        return _of_one_kind(_collected(config, renderer))
    return _of_one_kind(read_records(config, _PreferenceParser(config, renderer, reasoning_mode).record))


def _of_one_kind(units: Sequence[PreferencePair | PreferenceGroup]) -> list[PreferencePair] | list[PreferenceGroup]:
    pairs = [unit for unit in units if isinstance(unit, PreferencePair)]
    groups = [unit for unit in units if isinstance(unit, PreferenceGroup)]
    assert not (pairs and groups), "the parser and the file format let only one kind through"
    return pairs or groups


def _is_collected(path: Path) -> bool:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return bool(_format(file))
    except pyarrow.ArrowInvalid:
        return False  # what is wrong with it is said where its records are read


def _collected(config: PreferenceFile, renderer: Renderer) -> list[PreferencePair | PreferenceGroup]:
    """The units of a collect stage's file, known to fit this model: its tokenizer and its context."""
    path = config.path
    if config.system_prompt:
        fix = "Set system_prompt to null"
        raise DataError(f"system_prompt = {config.system_prompt}: must be null for {path}. It holds tokens. {fix}.")
    records = read_selected(existing_file(path))[: config.limit]
    for number, record in enumerate(records, start=1):
        for example, text in zip(_examples(record.unit), record.completions, strict=True):
            if renderer.completion_text(example.token_ids[example.loss_mask], record.reasoning_mode) != text:
                reason = "Its tokens say something else than its text"
                fix = "Use the model it was collected with, or collect anew"
                raise DataError(f"{path}, row {number}: must be of this model's tokenizer. {reason}. {fix}.")
            if len(example.token_ids) > renderer.max_context_tokens:
                limit = f"{renderer.max_context_tokens} (model.max_context_tokens) tokens"
                found = f"It has {len(example.token_ids)}"
                raise DataError(f"{path}, row {number}: must have at most {limit}. {found}. Raise it or collect anew.")
    return [record.unit for record in records]


class _PreferenceParser:
    """Turns the values of one record into a pair or a group. The first record decides which of the two all have."""

    def __init__(self, config: PreferenceFile, renderer: Renderer, reasoning_mode: bool) -> None:
        self._config = config
        self._name = source_name(config)
        self._renderer = renderer
        self._reasoning_mode = reasoning_mode
        self._shape: tuple[str, int] | None = None

    def record(self, number: int, values: Mapping[str, Any]) -> PreferencePair | PreferenceGroup:
        """Raises BrokenRecord for the first rule the record breaks."""
        present = {name: value for name, value in values.items() if value is not None}
        shape = _shape(present, values)
        self._shape = self._shape or (shape, number)
        if shape != self._shape[0]:
            fix = "Put the two shapes into files of their own"
            reason = f"Record {self._shape[1]} has {self._shape[0]}, this one {shape}"
            raise BrokenRecord(f"must have the shape of the other records. {reason}. {fix}.")
        record_id = f"{self._name}:{number}"
        return self._group(record_id, present) if shape == GROUP_SHAPE else self._pair(record_id, present)

    def _pair(self, record_id: str, values: Mapping[str, Any]) -> PreferencePair:
        answers = [_answer(values[side], side) for side in SIDES]
        rendered = self._prompt(record_id, _conversation(values, answers))
        chosen, rejected = (self._example(rendered, a.text, side) for a, side in zip(answers, SIDES, strict=True))
        if np.array_equal(chosen.token_ids, rejected.token_ids):
            same = answers[0].text == answers[1].text
            reason = "Both are the same text" if same else "Without its <think> block each is the same text"
            raise BrokenRecord(f'{field_name("chosen")} must differ from "rejected". {reason}. Remove the record.')
        return PreferencePair(record_id, chosen, rejected)

    def _group(self, record_id: str, values: Mapping[str, Any]) -> PreferenceGroup:
        completions, rewards = _completions(values["completions"]), _rewards(values["rewards"])
        if len(completions) != len(rewards):
            found = f"There are {len(completions)} completions and {len(rewards)} rewards"
            raise BrokenRecord(f"{field_name('rewards')} must have one entry for each completion. {found}. Correct it.")
        rendered = self._prompt(record_id, _conversation(values, ()))
        examples = (self._example(rendered, text, f"completions[{i}]") for i, text in enumerate(completions))
        return PreferenceGroup(record_id, tuple(examples), rewards)

    def _prompt(self, record_id: str, messages: Messages) -> RenderedPrompt:
        messages = with_system(self._config.system_prompt, messages, "prompt")
        try:
            return self._renderer.prompt(Prompt(record_id, messages, answer="", reward=""), self._reasoning_mode)
        except DataError as error:
            raise BrokenRecord(str(error)) from error

    def _example(self, rendered: RenderedPrompt, text: str, field: str) -> TokenizedExample:
        completion: Completion = split_completion(text, field)
        try:
            return self._renderer.completion(rendered, completion.reasoning, completion.content)
        except DataError as error:
            raise BrokenRecord(f"{field_name(field)}, {error}") from error


def _shape(values: Mapping[str, Any], as_read: Mapping[str, Any]) -> str:
    """Which of the two shapes the record has, all of it and nothing of the other; `as_read` has its nulls too."""
    found = {shape: [name for name in shape.split(" and ") if name in values] for shape in (PAIR_SHAPE, GROUP_SHAPE)}
    if all(found.values()):
        both = ", ".join(name for names in found.values() for name in names)
        raise BrokenRecord(f"must have {PAIR_SHAPE}, or {GROUP_SHAPE}, not both. It has {both}. Remove one of the two.")
    shape = GROUP_SHAPE if found[GROUP_SHAPE] else PAIR_SHAPE
    missing = next((name for name in shape.split(" and ") if name not in values), None)
    if missing is None:
        return shape
    needs = shape if found[shape] else f"{PAIR_SHAPE}, or {GROUP_SHAPE}"
    raise BrokenRecord(f"{field_name(missing)} must be there: a record has {needs}. {missing_hint(as_read, missing)}")


# --- the prompt and what follows it -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    """A chosen or rejected completion and the messages that came before it in its own field."""

    text: str
    before: tuple[Any, ...]
    field: str


def _answer(value: Any, field: str) -> _Answer:
    if isinstance(value, str):
        return _Answer(_filled(value, field), (), field)
    if not isinstance(value, list | tuple) or not value:
        fix = 'Write text or [{"role": "assistant", "content": "..."}]'
        raise BrokenRecord(f"{field_name(field)} must be text or a list of messages. Found {shown(value)}. {fix}.")
    last = f"{field}[{len(value) - 1}]"
    message = parse_message(value[-1], last, len(value) - 1)
    if message["role"] != "assistant":
        reason = f'The last turn is from "{message["role"]}"'
        raise BrokenRecord(f"{field_name(last)} must be an assistant's turn. {reason}. Correct the record.")
    return _Answer(_filled(message["content"], f"{last}.content"), tuple(value[:-1]), field)


def _conversation(values: Mapping[str, Any], answers: Sequence[_Answer]) -> Messages:
    """The prompt's messages; whatever an answer has before it in its own field must be the same."""
    implicit = bool(answers) and all(answer.before for answer in answers) and not {"prompt", "messages"} & set(values)
    own = None if implicit else _own_prompt(values)
    before = {answer.field: parse_messages(answer.before, answer.field) for answer in answers if answer.before}
    messages = own or before["chosen"]
    for field, found in before.items():
        if found != messages:
            expected = "the prompt" if own else 'the same turns as "chosen"'
            reason = "What comes before its last turn is different"
            raise BrokenRecord(f"{field_name(field)} must begin with {expected}. {reason}. Correct the record.")
    return messages


def _own_prompt(values: Mapping[str, Any]) -> Messages:
    name = "prompt" if "prompt" in values or "messages" not in values else "messages"
    if name not in values:
        fix = "Add it, or write chosen and rejected as whole conversations"
        raise BrokenRecord(f"{field_name(name)} must be there. {missing_hint(values, name)} {fix}.")
    if not isinstance(values[name], str):
        return parse_messages(values[name], name)
    asked, chat = user_turn(_filled(values[name], name)), values.get("messages")
    ends_with_it = name == "prompt" and isinstance(chat, list) and chat and chat[-1] == asked[0]
    return parse_messages(chat, "messages") if ends_with_it else asked


def _completions(value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or len(value) < 2:
        fix = "Write a list of texts"
        raise BrokenRecord(f"{field_name('completions')} must be a list of at least two. Found {shown(value)}. {fix}.")
    return [_filled(text, f"completions[{index}]") for index, text in enumerate(value)]


def _rewards(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        fix = "Write a list of numbers"
        raise BrokenRecord(f"{field_name('rewards')} must be a list of numbers. Found {shown(value)}. {fix}.")
    for index, reward in enumerate(value):
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            name = field_name(f"rewards[{index}]")
            raise BrokenRecord(f"{name} must be a finite number. Found {shown(reward)}. Correct the record.")
    return tuple(float(reward) for reward in value)


def _filled(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        name = field_name(field)
        raise BrokenRecord(f"{name} must be text that is not empty. Found {shown(value)}. Correct the record.")
    return value
