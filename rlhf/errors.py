"""Errors a user can act on. Each message says what, the rule, the reason and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The fix part of a message about an unknown name: the nearest known one, else `otherwise`, else all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    if nearest:
        return f"Did you mean {nearest[0]}?"
    return f"Known: {', '.join(names) or 'none'}." if otherwise is None else otherwise


class GroupwiseError(Exception):
    """Base of every error this program raises on purpose; the console prints it without a stack trace."""


class ConfigError(GroupwiseError):
    """The run configuration breaks one or more rules; `problems` has one line for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        heading = f"{count} problem{'s' if count != 1 else ''} in the configuration"
        super().__init__("\n".join([heading + ":", *(f"  - {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        # Exceptions are rebuilt from their message by default; this one crosses processes with its list.
        return type(self), (self.problems,)


class DataError(GroupwiseError):
    """A record or a data source breaks a rule; the message names the file, the line and the field."""


class OutOfMemoryError(GroupwiseError):
    """A learner ran out of memory; the message names the settings that would have helped."""


class StorageError(GroupwiseError):
    """A file or directory cannot be written; the message names the path, the space it needs and what is free."""


class CheckpointError(GroupwiseError):
    """A checkpoint is damaged, or is not one of this run; the message names the file and what is wrong with it."""


class ReplayError(GroupwiseError):
    """A journaled step that was trained again did not give what it gave the first time."""


class RewardFailureError(GroupwiseError):
    """More rewards failed than the error budget allows; carries the author's traceback."""


class AttestationError(GroupwiseError):
    """After a weight sync an engine does not hold the learner's weights."""


class NonFiniteError(GroupwiseError):
    """The loss or the gradient norm stopped being finite."""


class DeadlineError(GroupwiseError):
    """A named wait passed its deadline."""


class WorkerLostError(GroupwiseError):
    """A worker process died or raised; carries that worker's own traceback."""


class ProcessLostError(WorkerLostError):
    """A worker process of the run died: killed, out of memory, or with its node. Another try may succeed."""
