"""Rows `{"prompt", "completion", "answer", "metadata"?}`: read, checked and grouped; and the result of one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import DataError
from rlhf.samples import (
    Abstained,
    Prompt,
    RewardFailed,
    RewardOutcome,
    RewardValue,
    TextGroup,
    TextSample,
)
from rlhf.thinking import THINK_OPEN

MAX_PROBLEMS = 20
MAX_GROUP = 256
MAX_TOKENS = 1_000_000
MAX_LINE_CHARS = 64 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One completion to judge. `fields` is the row as it was given; `place` says where it stands."""

    place: str
    messages: tuple[Mapping[str, str], ...]
    completion: str
    answer: str
    metadata: Mapping[str, Any]
    truncated: bool = False
    completion_tokens: int = 0
    reasoning_mode: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_same_prompt(self) -> str:
        """Equal for rows that are samples of one prompt."""
        return json.dumps([list(map(dict, self.messages)), self.answer, self.metadata, self.reasoning_mode])

    @property
    def prompt_text(self) -> str:
        return "\n\n".join(message["content"] for message in self.messages)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file one by one. Raises DataError where one is malformed; `check` reports them all."""
    for place, raw in _lines(path):
        if isinstance(raw, str):
            raise DataError(f"{place}: {raw}")
        yield row_of(raw, place)


def check(path: Path) -> int:
    """The number of rows of a file in which every row is well formed. Raises DataError with the first problems."""
    count, problems = 0, []
    for place, raw in _lines(path):
        count += 1
        problems += [f"{place}: {raw}"] if isinstance(raw, str) else [f"{place}: {text}" for text in row_problems(raw)]
        if len(problems) >= MAX_PROBLEMS:
            problems.append("... the rest was not looked at")
            break
    if problems:
        raise DataError("\n".join(problems))
    if not count:
        raise DataError(f"{path}: has no rows. There is nothing to score. Give one JSON object a line.")
    return count


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, the JSON value there, or in a text what is wrong with it); empty lines are left out."""
    if not path.is_file():
        raise DataError(f"{path}: must be a file with one JSON object a line. There is none. Correct the path.")
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_CHARS + 1)
            if not line:
                return
            if line.strip():
                yield f"{path}:{number}", _json_of(line)
            if len(line) > MAX_LINE_CHARS:
                return


def _json_of(line: bytes) -> Any:
    if len(line) > MAX_LINE_CHARS:
        return f"must be at most {MAX_LINE_CHARS >> 20} MiB. A row is one completion. Give one JSON object a line."
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"must be JSON. {error}. Give one JSON object a line."
    return raw if isinstance(raw, dict) else "must be a JSON object. Its fields are prompt, completion and answer."


# --- the rules --------------------------------------------------------------------------------------------------------


def row_of(raw: Mapping[str, Any], place: str) -> Row:
    """The row. Raises DataError naming the place, the field and the rule."""
    if problems := row_problems(raw):
        raise DataError("\n".join(f"{place}: {problem}" for problem in problems))
    prompt = raw["prompt"]
    return Row(
        place=place,
        messages=({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt),
        completion=raw["completion"],
        answer=raw["answer"],
        metadata=raw.get("metadata") or {},
        truncated=raw.get("truncated", False),
        completion_tokens=raw.get("completion_tokens", 0),
        reasoning_mode=raw.get("reasoning_mode", raw["completion"].lstrip().startswith(THINK_OPEN)),
        fields=raw,
    )


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_message, value)))


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS


def _is_metadata(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_prompt, 'must be text or a list of messages {"role", "content"}'),
    "completion": (_is_text, "must be text"),
    "answer": (_is_text, 'must be text, "" where there is none'),
    "metadata": (_is_metadata, "must be an object"),
    "truncated": (_is_flag, "must be true or false"),
    "completion_tokens": (_is_count, f"must be a whole number of 0 to {MAX_TOKENS}"),
    "reasoning_mode": (_is_flag, "must be true or false"),
}
_NEEDED = ("prompt", "completion", "answer")


def row_problems(raw: Mapping[str, Any]) -> list[str]:
    """One `field = value: rule` for each rule that the row breaks."""
    problems = []
    for name, (holds, rule) in _RULES.items():
        if name not in raw and name in _NEEDED:
            problems.append(f"{name}: {rule}. It is missing; the row has {', '.join(map(str, raw)) or 'nothing'}.")
        elif name in raw and not holds(raw[name]):
            problems.append(f"{name} = {_short(raw[name])}: {rule}.")
    return problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- as groups, and what came of them ---------------------------------------------------------------------------------


def grouped(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows that follow each other and are samples of one prompt, at most MAX_GROUP at a time."""
    for _, same in itertools.groupby(rows, key=lambda row: row.of_same_prompt):
        while group := list(itertools.islice(same, MAX_GROUP)):
            yield group


def text_group(rows: Sequence[Row], reward: str) -> TextGroup:
    """Rows of one prompt as the group that a scorer takes."""
    first = rows[0]
    prompt = Prompt(first.place, first.messages, first.answer, reward, first.metadata)
    samples = tuple(TextSample(row.place, row.completion, row.completion_tokens, row.truncated) for row in rows)
    return TextGroup(first.place, prompt, first.reasoning_mode, 0, samples)


def result_of(outcome: RewardOutcome, reward: str, seconds: float) -> dict[str, Any]:
    """`{"status", "value", "parts", "reason", "seconds"}`; an error also has `error`: kind, traceback, attempts."""
    result: dict[str, Any] = {"status": "", "value": None, "parts": {}, "reason": "", "seconds": round(seconds, 6)}
    match outcome:
        case RewardValue(task=value, parts=parts, reason=reason):
            prefix = f"{reward}/"
            own = {key.removeprefix(prefix): part for key, part in parts.items() if key.startswith(prefix)}
            return result | {"status": "value", "value": value, "parts": own, "reason": reason}
        case Abstained(reason=reason):
            return result | {"status": "abstain", "reason": reason}
        case RewardFailed(message=message, kind=kind, traceback=trace, attempts=attempts):
            error = {"kind": kind, "traceback": trace, "attempts": attempts}
            return result | {"status": "error", "reason": message, "error": error}
