"""Which run is resumed, that it is the same one, and what happens to its records."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import jsonl
from rlhf.checkpoints.journal import JournaledStep
from rlhf.checkpoints.resume import (
    ResumePoint,
    check_replayed,
    cut_records,
    find_run,
    locked,
    require_same,
    require_same_data,
    saved_config,
)
from rlhf.checkpoints.store import Checkpoint
from rlhf.config import RunConfig
from rlhf.errors import CheckpointError, ConfigError, DataError, ReplayError


def config(**changes: Any) -> RunConfig:
    source = {"kind": "procedural"}
    return RunConfig.model_validate(
        {
            "experiment": "demo",
            "model": {"kind": "exaone4_tiny"},
            "data": {"train": source, "evaluation": source},
            "stages": {"rl": {"kind": "rl", "steps": 3, "optimizer": {"learning_rate": 1e-3}}},
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            **changes,
        }
    )


def run_dir(root: Path, name: str, *, finished: bool = False) -> Path:
    path = root / name
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config().model_dump(mode="json")))
    if finished:
        (path / "summary.json").write_text("{}")
    return path


def test_a_run_is_found_by_its_path_and_by_its_name(tmp_path: Path) -> None:
    made = run_dir(tmp_path, "20260101-000000-demo-aaaaaa")
    assert find_run(str(made), tmp_path / "elsewhere", "other") == made
    assert find_run(made.name, tmp_path, "other") == made


def test_auto_takes_the_newest_run_of_the_experiment_or_none(tmp_path: Path) -> None:
    assert find_run("auto", tmp_path, "demo") is None
    run_dir(tmp_path, "20260101-000000-demo-aaaaaa")
    newest = run_dir(tmp_path, "20260102-000000-demo-bbbbbb")
    run_dir(tmp_path, "20260103-000000-other-cccccc")
    assert find_run("auto", tmp_path, "demo") == newest
    run_dir(tmp_path, "20260104-000000-demo-dddddd", finished=True)
    assert find_run("auto", tmp_path, "demo") is None


def test_a_run_that_is_not_there_or_has_finished_is_refused(tmp_path: Path) -> None:
    run_dir(tmp_path, "20260101-000000-demo-aaaaaa", finished=True)
    with pytest.raises(ConfigError, match=r"Did you mean 20260101-000000-demo-aaaaaa\?"):
        find_run("20260101-000000-demo-aaaaab", tmp_path, "demo")
    with pytest.raises(ConfigError, match=r"must be an unfinished run. It has a summary.json"):
        find_run("20260101-000000-demo-aaaaaa", tmp_path, "demo")


def test_a_changed_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    path = run_dir(tmp_path, "run")
    require_same(config(resume="run", dry_run=True), path)
    changed = config(seed=3, rollouts={"group_size": 16})
    with pytest.raises(ConfigError) as refused:
        require_same(changed, path)
    [group_size, seed, fix] = refused.value.problems
    assert group_size == "rollouts.group_size = 16: must be 8, as in the run that is resumed."
    assert seed == "seed = 3: must be 0, as in the run that is resumed."
    assert "resume=run and nothing else" in fix
    assert RunConfig.model_validate(saved_config(path)) == config()


def journaled(step: int, **changes: Any) -> JournaledStep:
    digests = [{"embed": "a", "head": "b"}, {"head": "c"}]
    found = JournaledStep(step, step + 1, [0.5, -2.0], [1.0, 1.0], digests, [{"threads": 1}] * 2, {}, {})
    return replace(found, **changes)


def test_a_replayed_step_must_have_the_recorded_bits() -> None:
    step = journaled(7)
    assert check_replayed(step, [0.5, -2.0], step.digests, step.machines)
    with pytest.raises(ReplayError, match=r"step 7, rank 1, tensor head: has other bits .* x and not c"):
        check_replayed(step, [0.5, -2.0], [step.digests[0], {"head": "x"}], step.machines)
    with pytest.raises(ReplayError, match=r"step 7, rank 1, tensor head: .* absent and not c"):
        check_replayed(step, [0.5, -2.0], [step.digests[0], {}], step.machines)


def test_on_another_machine_or_layout_a_replayed_step_must_have_the_recorded_losses() -> None:
    step, elsewhere = journaled(7), [{"threads": 2}]
    assert not check_replayed(step, [0.500004, -2.00001], [{"embed": "x"}], elsewhere)
    with pytest.raises(ReplayError, match=r"step 7, optimiser step 1: has the loss -2.0001 .* had -2"):
        check_replayed(step, [0.5, -2.0001], [{"embed": "x"}], elsewhere)


def test_changed_data_are_refused_by_stage() -> None:
    require_same_data({"sft": "a", "rl": "b"}, {"sft": "a", "rl": "b"})
    with pytest.raises(CheckpointError, match=r"stages\.rl: must have the data of the run"):
        require_same_data({"sft": "a", "rl": "b"}, {"sft": "a", "rl": "c"})


def test_records_after_the_checkpoint_are_set_aside(tmp_path: Path) -> None:
    path, expected = tmp_path / "metrics.jsonl", []
    lines = jsonl.JsonLines(path)
    for step in range(3):
        lines.append({"step": step, "text": "ä"})
        expected.append(lines.size)
    lines.close()
    checkpoint = Checkpoint(tmp_path, {"record_bytes": {"metrics.jsonl": expected[0]}}, {})
    later = journaled(4, record_bytes={"metrics.jsonl": expected[1]})
    cut_records(tmp_path, ResumePoint(checkpoint, (later,)), ("metrics.jsonl", "samples.jsonl"))
    assert [record["step"] for record in jsonl.read(path)] == [0, 1]
    assert [record["step"] for record in jsonl.read(tmp_path / "metrics.discarded.jsonl")] == [2]
    cut_records(tmp_path, None, ("metrics.jsonl",))
    assert path.read_bytes() == b""


def test_records_that_the_disk_lost_are_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    checkpoint = Checkpoint(tmp_path, {"record_bytes": {"metrics.jsonl": 40}}, {})
    with pytest.raises(DataError, match="must have 40 bytes or more, as the checkpoint says, and has 3"):
        cut_records(tmp_path, ResumePoint(checkpoint, ()), ("metrics.jsonl",))


def _hold(path: Path, ready: Any, done: Any) -> None:
    with locked(path):
        ready.set()
        done.wait(20)


def test_a_run_that_is_running_cannot_be_resumed_and_one_that_was_killed_can(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, done))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(ConfigError, match=f"must not be running. Process {holder.pid} writes to it"), locked(tmp_path):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
