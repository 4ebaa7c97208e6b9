"""The attacks and honest solutions, read from `programs/*.toml` and `texts/*.toml`. A file is a family.

A program is a solution of a coding task that is graded in a sandbox; a text is a completion that another reward judges.
Each `[[attack]]` must get nothing, each `[[honest]]` everything. In programs and texts @SECRET_NAME@, @SECRET_FILE@,
@CANARY@, @PORT@, @SOCKET@, @VICTIM@ and @SUITE@ stand for what a `host.Host` puts within reach of a broken sandbox.

Nothing here may hurt a machine whose sandbox fails: what would (killing every process, deleting a tree, a fork bomb) is
aimed at the canary or the victim, asks only for permission, or is bounded. A program that finds itself outside returns
the right answer, so that an escape without a trace shows as a score.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rewards.code import Tier
from rewards.registry import RewardInput

FOLDER = Path(__file__).parent
EVERY_TIER = (Tier.STRONG, Tier.USERNS, Tier.LANDLOCK)

Task = Literal["values", "secret", "stdin", "referee"]
Expected = Literal["zero", "error", "zero or error"]


@dataclass(frozen=True, slots=True)
class Program:
    """A solution of the task `task` (see `code_run.TESTS`).

    `partial`: single answers of it may be right, only all of them may not. `tiers`: where an honest one must pass.
    """

    id: str
    family: str
    tries: str
    source: str
    task: Task = "values"
    honest: bool = False
    partial: bool = False
    tiers: tuple[str, ...] = EVERY_TIER


@dataclass(frozen=True, slots=True)
class Text:
    """A completion for the reward `reward`; in the files it may be a list of [text, how often] pairs.

    An attack is worth `at_most`, or fails the grader where `expected` allows it; an honest text is worth `at_least`.
    """

    id: str
    family: str
    tries: str
    reward: str
    completion: str
    answer: str = ""
    question: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False
    reasoning_mode: bool = False
    honest: bool = False
    expected: Expected = "zero"
    at_most: float = 0.0
    at_least: float = 1.0
    deadline_s: float = 5.0

    def sample(self, completion: str) -> RewardInput:
        """What the reward sees, with the completion as it is after its placeholders were filled in."""
        return RewardInput.of(
            completion,
            self.answer,
            messages=({"role": "user", "content": self.question},),
            metadata=self.metadata,
            truncated=self.truncated,
            reasoning_mode=self.reasoning_mode,
        )


Case = Program | Text


@cache
def programs() -> tuple[Program, ...]:
    """Every program, in the order of the files."""
    return tuple(
        Program(**_common(row, family, honest), tiers=tuple(row.pop("tiers", EVERY_TIER)), **row)
        for family, honest, row in _rows("programs")
    )


@cache
def texts() -> tuple[Text, ...]:
    """Every text, in the order of the files."""
    return tuple(
        Text(**_common(row, family, honest), completion=_joined(row.pop("completion")), **row)
        for family, honest, row in _rows("texts")
    )


def everything() -> tuple[Case, ...]:
    """Programs, then texts."""
    return (*programs(), *texts())


def families() -> tuple[str, ...]:
    """The names of all families, in the order of `everything`."""
    return tuple(dict.fromkeys(case.family for case in everything()))


def _rows(folder: str) -> Iterable[tuple[str, bool, dict[str, Any]]]:
    for path in sorted((FOLDER / folder).glob("*.toml")):
        tables = tomllib.loads(path.read_text())
        for kind, honest in (("attack", False), ("honest", True)):
            for row in tables[kind]:
                yield path.stem.replace("_", " "), honest, dict(row)


def _common(row: dict[str, Any], family: str, honest: bool) -> dict[str, Any]:
    return {"id": row.pop("id"), "tries": row.pop("tries", "an honest solution"), "family": family, "honest": honest}


def _joined(completion: str | list[list[Any]]) -> str:
    return completion if isinstance(completion, str) else "".join(text * times for text, times in completion)
