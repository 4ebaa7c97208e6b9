"""Rows of files and data sets -> prompts, each one checked before the run starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.errors import ConfigError
from rlhf.samples import Prompt
from rlhf.thinking import THINK_CLOSE, THINK_OPEN
from rollouts.rows import (
    BrokenRecord,
    FileSource,
    column_of,
    field_name,
    missing_hint,
    read_records,
    shown,
    source_name,
    text_of,
)

ROLES = ("system", "user", "assistant", "tool")

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    reasoning: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """`completion` is None where the source names no completion column."""

    prompt: Prompt
    completion: Completion | None


def load_records(config: FileSource) -> list[Record]:
    """All records of the source (the first `limit` of them), in file order, at least one.

    Raises ConfigError where the column settings cannot work, DataError where the file or its records break a rule.
    """
    return read_records(config, _RecordParser(config).record)


# --- records ----------------------------------------------------------------------------------------------------------


class _RecordParser:
    """Turns the values of one record into a Record by the columns of the source."""

    def __init__(self, config: FileSource) -> None:
        problems = _column_problems(config)
        if problems:
            raise ConfigError(problems)
        self._config = config
        self._columns = config.columns
        self._name = source_name(config)
        self._answer_pattern = re.compile(config.answer_pattern) if config.answer_pattern else None

    def record(self, number: int, values: Mapping[str, Any]) -> Record:
        """Raises BrokenRecord for the first rule the record breaks."""
        prompt = Prompt(
            prompt_id=f"{self._name}:{number}",
            messages=self._messages(values),
            answer=self._answer(values),
            reward=self._reward(values),
            metadata={column: column_of(values, column) for column in self._columns.metadata},
        )
        return Record(prompt, self._completion(values))

    def _messages(self, values: Mapping[str, Any]) -> Messages:
        column = self._columns.prompt
        if column is not None:
            return with_system(self._config.system_prompt, user_turn(text_of(values, column)), column)
        column = self._columns.messages
        assert column is not None
        return with_system(self._config.system_prompt, parse_messages(column_of(values, column), column), column)

    def _answer(self, values: Mapping[str, Any]) -> str:
        column = self._columns.answer
        if column is None:
            return ""
        answer = _answer_text(column_of(values, column), column)
        if self._answer_pattern is None:
            return answer
        matches = list(self._answer_pattern.finditer(answer))
        if not matches or matches[-1].group(1) is None:
            rule = f"must match answer_pattern {self._answer_pattern.pattern!r}"
            raise BrokenRecord(
                f"{field_name(column)} {rule}. Found {shown(answer)}. Correct the pattern or the record."
            )
        return matches[-1].group(1).strip()

    def _reward(self, values: Mapping[str, Any]) -> str:
        column = self._columns.reward
        name = values.get(column) if column is not None else None
        if name is None and self._config.reward is not None:
            return self._config.reward
        if column is None:
            raise AssertionError("the column settings were checked: there is a reward or a reward column")
        if name is None:
            hint = missing_hint(values, column)
            raise BrokenRecord(
                f"{field_name(column)} must name the reward. {hint} Add it, or set reward for all records."
            )
        if not isinstance(name, str) or not name:
            raise BrokenRecord(f"{field_name(column)} must be the name of a reward. Found {shown(name)}. Write a name.")
        return name

    def _completion(self, values: Mapping[str, Any]) -> Completion | None:
        column = self._columns.completion
        return None if column is None else split_completion(text_of(values, column), column)


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


def user_turn(text: str) -> Messages:
    return ({"role": "user", "content": text},)


def with_system(system_prompt: str | None, messages: Messages, column: str) -> Messages:
    """The messages of field `column` behind the source's system prompt, where it has one."""
    if not system_prompt:
        return messages
    if messages[0]["role"] == "system":
        rule = "must not begin with a system turn"
        raise BrokenRecord(f"{field_name(column)} {rule}. system_prompt is set too. Remove one of the two.")
    return ({"role": "system", "content": system_prompt}, *messages)


def parse_messages(value: Any, column: str) -> Messages:
    """Checked chat messages: known roles, text contents, a system turn only in front, a non-empty user turn last."""
    if not isinstance(value, list | tuple) or not value:
        fix = 'Write [{"role": "user", "content": "..."}]'
        raise BrokenRecord(f"{field_name(column)} must be a non-empty list of messages. Found {shown(value)}. {fix}.")
    messages = tuple(parse_message(message, f"{column}[{index}]", index) for index, message in enumerate(value))
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        fix = "Move a worked answer to a completion column, or end with the question"
        raise BrokenRecord(f'{field_name(column)} must end with a user turn. The last turn is from "{role}". {fix}.')
    if not messages[-1]["content"].strip():
        raise BrokenRecord(
            f"{field_name(column)} must not end with an empty prompt. Found {shown('')}. Remove the record."
        )
    return messages


def parse_message(message: Any, name: str, index: int) -> Mapping[str, str]:
    """A checked message, the `index`-th of its conversation; `name` is what messages call it."""
    if not isinstance(message, Mapping):
        raise BrokenRecord(
            f"{field_name(name)} must be a message. Found {shown(message)}. Give it a role and a content."
        )
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            found = f"Found {shown(message[key])}" if key in message else "It has none"
            raise BrokenRecord(f"{field_name(f'{name}.{key}')} must be text. {found}. Write the {key} as text.")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if extra:
        fix = "Remove it, or move it to a metadata column"
        raise BrokenRecord(f"{field_name(f'{name}.{extra[0]}')} is not read. A message is a role and a content. {fix}.")
    role = message["role"]
    if role not in ROLES or (role == "system" and index):
        rule = f"must be one of {', '.join(ROLES)}, system only for the first message"
        raise BrokenRecord(f"{field_name(f'{name}.role')} {rule}. Found {shown(role)}. Correct the role.")
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
        raise BrokenRecord(f"{field_name(column)} {rule}. Found {found} in {shown(text)}. Correct the tags.")
    reasoning, content = body.removeprefix(THINK_OPEN).split(THINK_CLOSE)
    if not content.strip():
        fix = "Add the answer after it"
        raise BrokenRecord(f"{field_name(column)} must have an answer. Nothing follows {THINK_CLOSE}. {fix}.")
    return Completion(reasoning.strip("\r\n"), content.lstrip("\r\n"))


def _answer_text(value: Any, column: str) -> str:
    """Text as it is; a finite number as Python writes it."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    rule = "must be text that is not empty, or a finite number"
    raise BrokenRecord(f"{field_name(column)} {rule}. Found {shown(value)}. Correct the record.")
