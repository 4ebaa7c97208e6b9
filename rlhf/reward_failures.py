"""`reward_failures.jsonl` in the run directory: each failed reward with all that is needed to make it fail again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.jsonl import JsonLines
from rlhf.samples import RewardFailed, Sample, ScoredGroup

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
    prompt = scored.group.prompt
    for sample, failure in scored.failed:
        seen = scored.group.samples if failure.whole_group else (sample,)
        yield {
            "sample_id": sample.sample_id,
            "group_id": scored.group.group_id,
            "prompt_id": prompt.prompt_id,
            "weight_version": sample.first_version,
            "reward": failure.component,
            "params": _plain(failure.params),
            "samples": [_sample(one) for one in seen],
            "messages": _plain(prompt.messages),
            "answer": prompt.answer,
            "metadata": _plain(prompt.metadata),
            "reasoning_mode": scored.group.rendered.reasoning_mode,
            **_failure(failure),
        }


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "sample_id": sample.sample_id,
        "completion": sample.completion,
        "completion_tokens": sample.completion_tokens,
        "truncated": sample.truncated,
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
