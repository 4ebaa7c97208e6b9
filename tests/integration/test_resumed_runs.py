"""Whole runs that are killed and resumed: real Ray, real vLLM, real DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf import jsonl
from rlhf.ledger import STATES

REPOSITORY = Path(__file__).parents[2]
SFT_STEPS, RL_STEPS = 24, 8

SMALL = (
    "experiment=quickstart",
    f"stages.sft.steps={SFT_STEPS}",
    "stages.sft.batch_size=16",
    "stages.sft.optimizer.warmup_steps=0",
    f"stages.rl.steps={RL_STEPS}",
    "stages.rl.prompts_per_step=4",
    "stages.rl.evaluate_every=0",
    "stages.rl.optimizer.warmup_steps=0",
    "algorithm.group_filter=none",
    # A reward that groups differ in, so that every step changes the weights.
    "+rewards.components.conciseness={params: {target_tokens: 1, max_tokens: 16}, applies: always}",
    "rollouts.group_size=4",
    "rollouts.max_completion_tokens=16",
    "rollouts.max_staleness=1",
    "evaluation.prompts=8",
    "evaluation.samples_per_prompt=4",
    "checkpoints.every_steps=3",
    "tracking.samples_every=1",
)

PAIRS = Path(__file__).with_name("pairs.jsonl")
DPO = (
    f"+stages.dpo={{kind: preference, data: {{kind: jsonl, path: {PAIRS}}}, batch_size: 2, epochs: 16, "
    "algorithm: {name: dpo}, optimizer: {learning_rate: 1e-3}}"
)

pytestmark = pytest.mark.integration


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the run and everything it started, as a lost machine looks to its files."""
    parent = psutil.Process(process.pid)
    for one in [*parent.children(recursive=True), parent]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate(timeout=60)


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    wait_until(process, reached)
    kill_tree(process)


def wait_until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)


def stop_when(process: subprocess.Popen[str], reached: Callable[[], bool]) -> str:
    wait_until(process, reached)
    process.terminate()
    return process.communicate(timeout=120)[0]


def steps(run: Path, stage: str, file: str = "metrics.jsonl") -> list[dict[str, float]]:
    if not (run / file).exists():
        return []
    lines = [line for line in jsonl.read(run / file) if line["stage"] == stage]
    return [line for line in lines if "policy/loss" in line or "optim/grad_norm" in line]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name.split("-", 1)[1] for path in (run / "checkpoints").glob("[0-9]*"))


def replayed(run: Path, step: int) -> dict[str, list[str]]:
    """What `rlhf.replay` prints: for each metric the recorded value, the replayed one and the difference."""
    command = [sys.executable, "-m", "rlhf.replay", str(run), "--step", str(step)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    return {name: values for name, *values in rows}


def journaled(run: Path) -> int:
    """The last step of the RL stage that is whole in the journal; -1 if there is none."""
    return max((int(path.parent.name) for path in (run / "journal" / "rl").glob("*/step.json")), default=-1)


def events(run: Path, event: str) -> list[dict[str, object]]:
    return [line for line in jsonl.read(run / "ledger.jsonl") if line["event"] == event]


def newest_run(root: Path) -> Path:
    return (root / "latest").resolve()


def test_a_run_that_is_killed_goes_on_where_it_was_saved(tmp_path):
    root = tmp_path / "runs"
    process = start(*SMALL, f"run_root={root}")
    kill_when(process, lambda: len(steps(newest_run(root), "rl")) >= 5)
    run = newest_run(root)
    assert checkpoints(run)[-1] in {"rl-000003", "rl-000006"}
    saved, done = int(checkpoints(run)[-1][-6:]), journaled(run)
    trained, made = events(run, "trained"), steps(run, "rl")
    output = finish(start(*SMALL, f"run_root={root}", "resume=auto"))
    if done >= saved:
        assert f"steps {saved} to {done} were trained again from the journal; every tensor has the recorded" in output
    # What the journal has is neither sampled nor recorded again.
    assert events(run, "trained")[: 4 * (done + 1)] == trained[: 4 * (done + 1)]
    assert steps(run, "rl")[: done + 1] == made[: done + 1]
    check_whole(run)
    assert sum(step["optim/grad_norm"] > 0 for step in steps(run, "rl")) > RL_STEPS / 2
    last = steps(run, "rl")[-1]
    table = replayed(run, RL_STEPS - 1)
    assert table["optim/grad_norm"] == [f"{last['optim/grad_norm']:.8g}"] * 2 + ["0"]
    assert {values[2] for values in table.values()} <= {"0", "-"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worker", "how"),
    [
        ("RolloutWorker", signal.SIGKILL),
        ("LearnerWorker", signal.SIGKILL),
        ("RolloutWorker", signal.SIGSTOP),
    ],
)
def test_a_run_that_loses_a_worker_goes_on_by_itself(tmp_path, worker, how):
    root = tmp_path / "runs"
    process = start(*SMALL, f"run_root={root}", "rollouts.silence_deadline_s=20", "weight_sync.deadline_s=20")
    wait_until(process, lambda: len(steps(newest_run(root), "rl")) >= 4)
    started = psutil.Process(process.pid).children(recursive=True)
    victim = next(one for one in started if worker in " ".join(one.cmdline()))
    victim.send_signal(how)
    output = finish(process)
    assert ("the worker process was lost" in output) == (how == signal.SIGKILL)
    assert "restarts from checkpoint" in output
    assert "every tensor has the recorded bits" in output
    assert not [one for one in started if one.is_running()]
    check_whole(newest_run(root))


@pytest.mark.slow
def test_a_reward_worker_that_dies_is_replaced_while_the_run_goes_on(tmp_path):
    root = tmp_path / "runs"
    process = start(*SMALL, f"run_root={root}")
    wait_until(process, lambda: len(steps(newest_run(root), "rl")) >= 2)
    worker = next(p for p in psutil.Process(process.pid).children(recursive=True) if "RewardWorker" in str(p.cmdline()))
    worker.kill()
    assert "restarts from" not in finish(process)
    assert [line["step"] for line in steps(newest_run(root), "rl")] == list(range(RL_STEPS))
    check_ledger(newest_run(root))


@pytest.mark.slow
def test_a_run_that_is_ended_three_times_ends_as_one_that_never_was(tmp_path):
    root = tmp_path / "runs"
    command = (*SMALL, DPO, f"run_root={root}", f"cache_root={tmp_path}/cache")
    process = start(*command)
    kill_when(process, lambda: len(steps(newest_run(root), "sft")) >= 8)
    run = newest_run(root)
    first_sft = steps(run, "sft")
    assert checkpoints(run)[-1] in {"sft-000003", "sft-000006", "sft-000009"}

    # In the same words each time, as a scheduler says it; this time it gives notice.
    process = start(*command, "resume=auto")
    output = stop_when(process, lambda: len(steps(run, "rl")) >= 4)
    assert process.returncode == 130, output
    assert f"resume={run}" in output
    sft = steps(run, "sft")
    for before, after in zip(first_sft, sft, strict=False):
        assert (before["policy/loss"], before["optim/grad_norm"]) == (after["policy/loss"], after["optim/grad_norm"])
    assert checkpoints(run)[-1] == f"rl-{len(steps(run, 'rl')):06d}", "the last step that was made is saved"

    process = start(f"resume={run}")
    kill_when(process, lambda: len(steps(run, "dpo")) >= 8)
    finish(start(f"resume={run}"))
    check_whole(run, "dpo")
    discarded, dpo = steps(run, "dpo", "metrics.discarded.jsonl"), steps(run, "dpo")
    assert [line["step"] for line in dpo] == list(range(24))
    assert discarded, "what was done twice is kept beside the record"
    for before in discarded:
        after = dpo[int(before["step"])]
        assert (before["policy/loss"], before["optim/grad_norm"]) == (after["policy/loss"], after["optim/grad_norm"])
    assert "must be an unfinished run" in start(f"resume={run}").communicate(timeout=60)[0]


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return " ".join(output.split())  # the console breaks long lines


def check_whole(run: Path, *more: str) -> None:
    """The records of a run that has ended have no gap and nothing twice."""
    assert newest_run(run.parent) == run, "no other run was started"
    assert [line["step"] for line in steps(run, "sft")] == list(range(SFT_STEPS))
    assert [line["step"] for line in steps(run, "rl")] == list(range(RL_STEPS))
    check_ledger(run)
    summary = json.loads((run / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "rl", *more]
    assert summary["evaluation"].keys() == {"sft", "rl", *more}
    assert summary["rl"]["ledger"]["trained"] == 4 * RL_STEPS
    assert summary["rl"]["ledger"]["lost"] > 0


def check_ledger(run: Path) -> None:
    """Every group was dispatched once and ended once, and no group trained twice."""
    events = list(jsonl.read(run / "ledger.jsonl"))
    dispatched = Counter(event["group_id"] for event in events if event["event"] == "dispatched")
    ended = Counter(event["group_id"] for event in events if event["event"] in STATES)
    assert dispatched == ended
    assert set(dispatched.values()) == {1}
    trained = [event["detail"] for event in events if event["event"] == "trained"]
    assert Counter(trained) == dict.fromkeys(range(RL_STEPS), 4)
