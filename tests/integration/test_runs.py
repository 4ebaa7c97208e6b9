"""Whole runs from the command line: real Ray, real vLLM, real DeepSpeed, a tiny model and a few steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.integration

SMALL = (
    "experiment=quickstart",
    "stages.sft.steps=20",
    "stages.sft.batch_size=32",
    "stages.sft.optimizer.warmup_steps=0",
    "stages.rl.steps=3",
    "stages.rl.prompts_per_step=4",
    "stages.rl.evaluate_every=2",
    "stages.rl.optimizer.warmup_steps=0",
    "rollouts.group_size=4",
    "rollouts.max_completion_tokens=24",
    "evaluation.prompts=10",
    "evaluation.during_prompts=4",
    "evaluation.samples_per_prompt=4",
    "evaluation.before=false",
    "tracking.samples_every=1",
)

REWARDS = """
from rewards import reward

@reward("spread")
def spread(sample):
    \"\"\"Differs between samples, so that groups of an untrained model have something to learn.\"\"\"
    return (sum(map(ord, sample.completion)) % 10) / 10

@reward("broken")
def broken(sample):
    lookup = {}
    return lookup["a key that is not there"]
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def component(plugins: Path, name: str) -> tuple[str, ...]:
    return (f"rewards.modules=[{plugins}]", f"rewards.components.{name}={{weight: 1.0, applies: always}}")


def start(root: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "launch.py", *SMALL, f"run_root={root}", *overrides]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout_s: float = 500) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def ray_folders() -> set[Path]:
    return set(Path("/tmp").glob("groupwise-*"))


def left_behind(root: Path, folders_before: set[Path]) -> list[str]:
    """Folders and processes of a run under `root`: processes that name it, or a Ray folder made since."""
    folders = ray_folders() - folders_before
    marks, found = [str(root), *map(str, folders)], list(map(str, folders))
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry.parent / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if entry.parent.name != str(os.getpid()) and any(mark in command or mark in environment for mark in marks):
            found.append(command)
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def metrics(root: Path, stage: str) -> list[dict]:
    lines = (root / "latest" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


def test_a_run_trains_evaluates_saves_and_leaves_nothing_behind(tmp_path, plugins):
    from transformers import AutoModelForCausalLM

    before, folders = shared_memory(), ray_folders()
    root = tmp_path / "runs"
    code, output = finish(start(root, *component(plugins, "spread")))
    assert code == 0, output
    assert output.strip().splitlines()[-1].endswith("summary.json")
    summary = json.loads((root / "latest" / "summary.json").read_text())
    assert [(stage["name"], stage["steps"]) for stage in summary["stages"]] == [("sft", 20), ("rl", 3)]
    assert summary["evaluation"].keys() == {"sft", "rl"}
    assert {"greedy", "pass@1", "pass@1_stderr", "pass@4", "n_prompts"} <= summary["evaluation"]["rl"].keys()
    rl, ledger = summary["rl"], summary["rl"]["ledger"]
    assert rl["steps"] == 3
    assert ledger["trained"] == 12
    assert ledger["trained"] + ledger["filtered"] == ledger["dispatched"] == rl["groups_dispatched"]
    assert abs(rl["mismatch_kl_nats"]) < 1e-5
    for record in metrics(root, "rl"):
        if "mismatch/abs_gap_nats" in record:
            assert record["mismatch/abs_gap_nats"] < 1e-5
            assert record["mismatch/abs_gap_nats_max"] < 1e-3
            assert record["staleness/max_steps"] == 0
    samples = [json.loads(line) for line in (root / "latest" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 1, 2}
    assert all("spread" in row["parts"] and "math" in row["parts"] for row in samples)
    AutoModelForCausalLM.from_pretrained(root / "latest" / "policy")
    assert left_behind(root, folders) == []
    assert shared_memory() <= before


def test_two_engines_one_rank_and_a_staleness_of_one(tmp_path, plugins):
    root = tmp_path / "runs"
    overrides = ("rollouts.num_engines=2", "training.ranks=1", "rollouts.max_staleness=1", "stages.rl.steps=4")
    code, output = finish(start(root, *component(plugins, "spread"), *overrides))
    assert code == 0, output
    steps = [record for record in metrics(root, "rl") if "staleness/max_steps" in record]
    assert steps[0]["staleness/max_steps"] == 0
    assert max(record["staleness/max_steps"] for record in steps) == 1
    summary = json.loads((root / "latest" / "summary.json").read_text())
    assert summary["rl"]["ledger"]["trained"] == 16
    assert summary["rl"]["ledger"]["in_flight"] == 0


def test_a_reward_that_raises_stops_the_run_with_its_authors_traceback(tmp_path, plugins):
    root, folders = tmp_path / "runs", ray_folders()
    code, output = finish(start(root, *component(plugins, "broken"), "stages.sft.steps=1"))
    assert code == 1
    assert "my_rewards.py" in output
    assert 'return lookup["a key that is not there"]' in output
    assert "KeyError" in output
    assert left_behind(root, folders) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process(tmp_path, plugins, number):
    before, folders = shared_memory(), ray_folders()
    root = tmp_path / "runs"
    process = start(root, *component(plugins, "spread"), "stages.sft.steps=5000")
    deadline = time.monotonic() + 200
    while not (root / "latest" / "metrics.jsonl").exists() or not metrics(root, "sft"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(1)
    process.send_signal(number)
    code, output = finish(process, 120)
    assert code == 130, output
    assert left_behind(root, folders) == []
    assert shared_memory() <= before
