"""When a run is saved, what is saved, and that a full disk does not end it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpoints import saver
from rlhf.checkpoints.resume import resume_point
from rlhf.checkpoints.saver import Checkpoints, StageProgress
from rlhf.checkpoints.store import CheckpointStore
from rlhf.config import CheckpointsConfig, Exaone4TinyModel
from rlhf.models import prepare_model
from rlhf.runtime.interrupts import Interrupts
from rlhf.training.model_files import state_bytes


class Learners:
    full = False

    def save_state(self, directory: Path) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        directory.mkdir()
        (directory / "weights").write_bytes(b"w" * 100)


class Run:
    """The checkpoints of a run in `root`, as a stage uses them."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.told: list[str] = []
        self.store = CheckpointStore(root, keep=2)
        self.interrupts = Interrupts(self.told.append)
        resumed = resume_point(self.store, root / "journal", self.told.append)
        config = CheckpointsConfig(**settings)
        self.checkpoints = Checkpoints(self.store, root / "journal", config, self.interrupts, self.told.append, resumed)
        self.learners = Learners()
        self.checkpoints.begin(self.learners, lambda: {"record_bytes": {"metrics.jsonl": 7, "ledger.jsonl": 9}}, 100)

    def step(self, done: int, steps: int = 10) -> None:
        self.checkpoints.step_done("rl", done, steps, lambda: {"counter": done})

    @property
    def saved(self) -> list[int]:
        return sorted(int(path.name[-6:]) for path in self.store.root.glob("[0-9]*"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    return now


def test_a_step_is_saved_by_time_and_by_number_and_the_last_one_is_not(tmp_path: Path, clock: list[float]) -> None:
    run = Run(tmp_path, every_s=60, every_steps=4)
    for done in range(1, 11):
        clock[0] += 25  # due after three steps, and after four
        run.step(done)
    assert run.saved == [7, 8]
    by_time = Run(tmp_path / "by time", every_s=60)
    for done in range(1, 11):
        clock[0] += 25
        by_time.step(done)
    assert by_time.saved == [6, 9]


def test_a_resumed_stage_goes_on_and_other_stages_begin(tmp_path: Path) -> None:
    Run(tmp_path, every_steps=1).step(3)
    resumed = Run(tmp_path).checkpoints
    assert resumed.take_resumed("sft") == StageProgress()
    assert resumed.take_resumed("rl") == StageProgress(3, {"counter": 3})
    assert resumed.take_resumed("rl") == StageProgress(), "a later stage of the same name does not exist"


def test_the_length_of_a_file_that_is_being_written_comes_from_the_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.save("rl", 2, {"record_bytes": {"ledger.jsonl": 5}})
    found = run.store.newest(run.told.append)
    assert found is not None
    assert found.state["record_bytes"] == {"metrics.jsonl": 7, "ledger.jsonl": 5}


def test_a_full_disk_is_told_and_the_next_checkpoint_is_tried(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=1)
    run.step(1)
    run.learners.full = True
    run.step(2)
    [told] = run.told
    assert told.startswith("no checkpoint after step 2 of rl:")
    assert "The disk is full" in told
    run.learners.full = False
    run.step(3)
    assert run.saved == [1, 3]


def test_less_space_than_a_checkpoint_takes_is_noticed_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, every_steps=1)
    monkeypatch.setattr("rlhf.checkpoints.directories._free_bytes", lambda target: 99)
    monkeypatch.setattr(run.learners, "save_state", lambda directory: pytest.fail("begun"))
    run.step(1)
    assert "The disk is full" in run.told[0]


def test_a_run_that_is_asked_to_end_saves_its_step_and_ends(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(1)
    run.interrupts.requested = True
    with pytest.raises(KeyboardInterrupt):
        run.step(2)
    assert run.saved == [2]
    with pytest.raises(KeyboardInterrupt):
        run.step(10)
    assert run.saved == [2, 10], "its last step too"


def test_the_size_of_a_checkpoint_follows_from_the_model(tmp_path: Path) -> None:
    model = prepare_model(Exaone4TinyModel(kind="exaone4_tiny"), 0, tmp_path / "tiny")
    assert 9e6 < state_bytes(model) < 12e6
    assert state_bytes(tmp_path / "name-of-a-hub") == 0
