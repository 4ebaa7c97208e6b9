"""The life of a sample, told from the records of its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf import why
from rlhf.ledger import Ledger


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path)
    for group_id in ("rl-000000", "rl-000001"):
        ledger.dispatch(group_id, 3)
    ledger.close("rl-000000", "trained", 2)
    ledger.close("rl-000001", "filtered", "zero_variance")
    ledger.shutdown()
    row = {"stage": "rl", "step": 2, "group_id": "rl-000000", "sample_id": "rl-000000/1", "reward": 0.0}
    row |= {"note": "wrong (number): 1", "advantage": -0.5, "parts": {}, "finish_reason": "stop", "correct": False}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "journal" / "rl" / "000002").mkdir(parents=True)
    return tmp_path


def test_a_trained_sample_has_its_reward_and_the_command_that_trains_it_again(run_dir: Path) -> None:
    text = why.life(run_dir, "rl-000000/1")
    assert "dispatched at weight version 3" in text
    assert "trained (step 2)" in text
    assert "reward 0.0, correct False, advantage -0.5, finish_reason stop, note wrong (number): 1" in text
    assert f"python -m rlhf.replay {run_dir} --stage rl --step 2" in text


def test_a_group_that_did_not_train_has_no_such_command(run_dir: Path) -> None:
    text = why.life(run_dir, "rl-000001")
    assert "filtered (rule zero_variance)" in text
    assert "not in samples.jsonl" in text
    assert "replay" not in text


def test_an_unknown_sample_is_refused_with_the_nearest_name(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert why.main([str(run_dir), "rl-000010/1"]) == 1
    assert "Did you mean rl-000001" in capsys.readouterr().err
