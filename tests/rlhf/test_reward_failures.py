"""Failed rewards are on disk with what is needed to see them fail again, and the report says how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf import reward_failures
from rlhf.jsonl import read
from rlhf.reward_failures import FILE_NAME, RewardFailures, records
from rlhf.samples import RewardFailed, ScoredGroup

MakeScored = Callable[..., ScoredGroup]
FAILED = RewardFailed("mine", "KeyError: 'x'", "Traceback: line 7", 2, "raised", {"k": float("nan")})


def test_a_failed_sample_is_written_with_prompt_completion_and_parameters(
    make_scored: MakeScored, tmp_path: Path
) -> None:
    scored = make_scored((1.0, FAILED), group_id="rl-000003")
    sample, prompt = scored.group.samples[1], scored.group.prompt
    RewardFailures(tmp_path).recorded(scored)
    (record,) = read(tmp_path / FILE_NAME)
    assert (record["sample_id"], record["group_id"]) == (sample.sample_id, "rl-000003")
    assert record["messages"] == [dict(message) for message in prompt.messages]
    assert (record["answer"], record["reward"], record["params"]) == (prompt.answer, "mine", {"k": "nan"})
    assert [seen["completion"] for seen in record["samples"]] == [f"the completion of {sample.sample_id}"]
    assert (record["kind"], record["traceback"], record["attempts"]) == ("raised", "Traceback: line 7", 2)


def test_a_failed_group_reward_is_written_with_all_samples_of_the_group(make_scored: MakeScored) -> None:
    (record,) = records(make_scored((1.0, replace(FAILED, whole_group=True), 0.0)))
    assert len(record["samples"]) == 3


def test_the_report_names_sample_reward_and_message_once_and_the_command(
    make_scored: MakeScored, tmp_path: Path
) -> None:
    scored = make_scored((1.0, FAILED))
    sample_id = scored.group.samples[1].sample_id
    report = RewardFailures(tmp_path).recorded(scored).failure_report
    assert report.startswith(f"reward 'mine' on sample {sample_id}, ")
    assert report.endswith(f"\nSee it again: python -m rewards replay {sample_id} --run {tmp_path}")
    assert report.count("'mine'") == 1
    assert report.count("KeyError") == 1
    assert "replay" not in scored.failure_report


def test_groups_without_failures_leave_no_file(make_scored: MakeScored, tmp_path: Path) -> None:
    scored = make_scored((1.0, 0.0))
    assert RewardFailures(tmp_path).recorded(scored) is scored
    assert not (tmp_path / FILE_NAME).exists()


def test_the_file_is_bounded(make_scored: MakeScored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_failures, "MAX_RECORDS", 3)
    failures = RewardFailures(tmp_path)
    for _ in range(3):
        failures.recorded(make_scored((FAILED, FAILED)))
    assert len(list(read(tmp_path / FILE_NAME))) == 3


def test_metadata_that_json_does_not_know_is_written_as_text(make_scored: MakeScored) -> None:
    scored = make_scored((FAILED,))
    metadata: dict[Any, Any] = {"ids": np.arange(2), "size": np.float32(0.5), 3: {1}}
    prompt = replace(scored.group.prompt, metadata=metadata)
    (record,) = records(replace(scored, group=replace(scored.group, prompt=prompt)))
    assert record["metadata"] == {"ids": [0, 1], "size": 0.5, "3": "{1}"}
