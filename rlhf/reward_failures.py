"""`reward_failures.jsonl` in the run directory: each failed reward with all that is needed to make it fail again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf.jsonl import JsonLines
from rlhf.samples import RewardFailed, ScoredGroup

FILE_NAME = "reward_failures.jsonl"
MAX_RECORDS = 1000  # a reward that always fails must not fill the disk while the budget allows it


class RewardFailures:
    """Writes down the failed rewards of a run, the first `MAX_RECORDS` of them."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: JsonLines | None = None
        self._left = MAX_RECORDS

    def recorded(self, scored: ScoredGroup) -> ScoredGroup:
        """The same group; where it has failed rewards they are in the file, and its report says how to replay them."""
        written = list(records(scored))[: self._left]
        if not written:
            return scored
        self._file = self._file or JsonLines(self._run_dir / FILE_NAME)
        for record in written:
            self._file.append(record)
        self._left -= len(written)
        return replace(scored, run_dir=shlex.quote(str(self._run_dir)))


def records(scored: ScoredGroup) -> Iterator[dict[str, Any]]:
    """One plain record for each failed reward of the group.

    `sample_id`, `group_id`, `prompt_id`, `weight_version`, `reward`, `params`; `samples`: what the reward saw, one
    completion, or all of the group for a group reward; `messages`, `answer`, `metadata` and `reasoning_mode` of the
    prompt; `kind`, `message`, `traceback`, `attempts` and `whole_group` of the failure.
    """
    failures = [(number, one) for number, one in enumerate(scored.outcomes) if isinstance(one, RewardFailed)]
    if not failures:
        return
    prompt, text = scored.group.prompt, scored.group.stored.text()
    for number, failure in failures:
        sample = scored.group.samples[number]
        yield {
            "sample_id": sample.sample_id,
            "group_id": scored.group.group_id,
            "prompt_id": prompt.prompt_id,
            "weight_version": sample.first_version,
            "reward": failure.component,
            "params": _plain(failure.params),
            "samples": [asdict(one) for one in (text.samples if failure.whole_group else (text.samples[number],))],
            "messages": _plain(prompt.messages),
            "answer": prompt.answer,
            "metadata": _plain(prompt.metadata),
            "reasoning_mode": scored.group.reasoning_mode,
            **_failure(failure),
        }


def _failure(failure: RewardFailed) -> dict[str, Any]:
    names = ("kind", "message", "traceback", "attempts", "whole_group")
    return {name: getattr(failure, name) for name in names}


def _plain(value: Any) -> Any:
    """The value as JSON has it: arrays as lists; NaN, infinity and objects of other types as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
