"""Whole runs from the command line: real Ray, real vLLM, real DeepSpeed, a tiny model and a few steps.

Starting the stack takes longer than the steps, so tests share a run where what they check does not interfere.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

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

RATE = "optimizer: {learning_rate: 1e-3}"
PREFERENCE_STAGES = (
    "stages.sft.reasoning_token_ratio=1.5",
    "+stages.filter={kind: filter, prompts: 6, samples_per_prompt: 4}",
    "+stages.first={kind: collect, prompts: 12, samples_per_prompt: 4, weights: {spread: 1.0}}",
    "+stages.second={kind: collect, prompts: 8, samples_per_prompt: 4, reuse: first, reuse_fraction: 0.2}",
    "+stages.quartets={kind: collect, prompts: 8, samples_per_prompt: 5, produce: groups, group_size: 4}",
    f"+stages.dpo={{kind: preference, data: second, batch_size: 4, algorithm: {{name: dpo}}, {RATE}}}",
    f"+stages.simper={{kind: preference, data: first, batch_size: 4, algorithm: {{name: simper}}, {RATE}}}",
    f"+stages.grouper={{kind: preference, data: quartets, batch_size: 4, algorithm: {{name: grouper}}, {RATE}}}",
)

REWARDS = """
from functools import partial
from pathlib import Path
from rewards import reward

@reward("spread")
def spread(sample):
    \"\"\"Differs between samples, so that an untrained model has something to learn and to prefer.\"\"\"
    return (sum(map(ord, sample.completion)) % 10) / 10

@reward("broken")
def broken(sample, metrics: str):
    \"\"\"Nothing until the first step has trained, and then an error.\"\"\"
    if not Path(metrics).exists() or "policy/loss" not in Path(metrics).read_text():
        return 0.0
    lookup = {}
    return lookup["a key that is not there"]
"""


def write_rewards(folder: Path) -> Path:
    path = folder / "my_rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    return write_rewards(tmp_path)


def component(plugins: Path, name: str) -> tuple[str, ...]:
    return (f"rewards.modules=[{plugins}]", f"rewards.components.{name}={{weight: 1.0, applies: always}}")


def start(root: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "launch.py", *SMALL, f"run_root={root}", *overrides]
    return started(command, REPOSITORY, {**os.environ, "PYTHONPATH": str(REPOSITORY)})


def started(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout_s: float = 500) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        stop(process)
    return process.returncode, output


def stop(process: subprocess.Popen) -> None:
    """End a run that is still running because a test has failed: it would slow down all later tests."""
    if process.poll() is None:
        process.terminate()
        process.communicate(timeout=120)


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


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended: its exit status, what it printed, and what it left on the machine."""

    root: Path
    code: int
    output: str
    left: list[str]
    shared_memory_left: set[str]

    @property
    def folder(self) -> Path:
        return self.root / "latest"

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


class Watch:
    """Notes what is on the machine, to tell what a run has left there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders = ray_folders()
        self._shared_memory = shared_memory()

    def ended(self, process: subprocess.Popen, timeout_s: float = 500) -> EndedRun:
        code, output = finish(process, timeout_s)
        left = left_behind(self._root, self._folders)
        return EndedRun(self._root, code, output, left, shared_memory() - self._shared_memory)


# --- a run with stages of every kind ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> EndedRun:
    """SFT, RL, filter, collect and preference stages: two learner ranks, one engine, synchronous."""
    folder = tmp_path_factory.mktemp("finished")
    root = folder / "runs"
    watch = Watch(root)
    overrides = (f"cache_root={folder}/cache", "evaluation.prompts=4", *PREFERENCE_STAGES)
    run = watch.ended(start(root, *component(write_rewards(folder), "spread"), *overrides))
    assert run.code == 0, run.output
    return run


def test_a_run_trains_evaluates_saves_and_leaves_nothing_behind(finished: EndedRun) -> None:
    from transformers import AutoModelForCausalLM

    assert finished.output.strip().splitlines()[-1].endswith("summary.json")
    summary = finished.summary
    steps = {stage["name"]: stage["steps"] for stage in summary["stages"]}
    assert (steps["sft"], steps["rl"]) == (20, 3)
    assert {"greedy", "pass@1", "pass@1_stderr", "pass@4", "n_prompts"} <= summary["evaluation"]["rl"].keys()
    rl, ledger = summary["rl"], summary["rl"]["ledger"]
    assert rl["steps"] == 3
    assert ledger["trained"] == 12
    ended = ledger["trained"] + ledger["filtered"] + ledger["aborted"]
    assert ended == ledger["dispatched"] == rl["groups_dispatched"]
    assert abs(rl["mismatch_kl_nats"]) < 1e-5
    for record in metrics(finished.root, "rl"):
        if "mismatch/abs_gap_nats" in record:
            assert record["mismatch/abs_gap_nats"] < 1e-5
            assert record["mismatch/abs_gap_nats_max"] < 1e-3
            assert record["staleness/max_steps"] == 0
    samples = [json.loads(line) for line in (finished.folder / "samples.jsonl").read_text().splitlines()]
    trained = [row for row in samples if row["stage"] == "rl"]
    assert {row["step"] for row in trained} == {0, 1, 2}
    assert all("spread" in row["parts"] and "math" in row["parts"] for row in trained)
    AutoModelForCausalLM.from_pretrained(finished.folder / "policy")
    assert finished.left == []
    assert finished.shared_memory_left == set()


def test_the_preference_stages_filter_collect_and_train_on_what_was_collected(finished: EndedRun) -> None:
    summary = finished.summary
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert list(stages) == ["sft", "rl", "filter", "first", "second", "quartets", "dpo", "simper", "grouper"]
    assert summary["evaluation"].keys() == {"sft", "rl", "dpo", "simper", "grouper"}

    counts = stages["filter"]["filter"]
    assert sum(counts["histogram"]) + counts["unscored"] == counts["prompts"] == 6
    assert "kept 6 of 6 prompts" in finished.output
    # What the filter left is all that later stages take.
    for name in ("first", "second", "quartets"):
        assert stages[name]["collect"]["prompts"] == 6

    pairs = parquet.read_table(finished.folder / "preferences" / "first.parquet").to_pylist()
    assert len(pairs) == stages["first"]["collect"]["pairs"] > 0
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert all(dict(pair["chosen_parts"])["spread"] == pair["chosen_reward"] for pair in pairs)
    groups = parquet.read_table(finished.folder / "preferences" / "quartets.parquet").to_pylist()
    assert all(len(group["completions"]) == 4 for group in groups)

    first = {name: metrics(finished.root, name)[0] for name in ("dpo", "simper", "grouper")}
    # The policy is its own reference before the first update, so every margin is 0 and the loss is log 2.
    assert first["dpo"]["policy/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["dpo"]["preference/margin"] == pytest.approx(0.0, abs=1e-4)
    assert {"preference/accuracy", "preference/chosen_logprob", "preference/rejected_logprob"} <= first["simper"].keys()
    assert {"preference/best_probability", "preference/worst_probability"} <= first["grouper"].keys()
    assert all(first[name]["optim/grad_norm"] > 0 for name in first)


def test_two_engines_one_rank_and_a_staleness_of_one(tmp_path: Path, plugins: Path) -> None:
    root = tmp_path / "runs"
    overrides = ("rollouts.num_engines=2", "training.ranks=1", "rollouts.max_staleness=1", "stages.rl.steps=4")
    code, output = finish(start(root, *component(plugins, "spread"), *overrides, "tracking=local"))
    assert code == 0, output
    steps = [record for record in metrics(root, "rl") if "staleness/max_steps" in record]
    assert steps[0]["staleness/max_steps"] == 0
    assert max(record["staleness/max_steps"] for record in steps) == 1
    summary = json.loads((root / "latest" / "summary.json").read_text())
    assert summary["rl"]["ledger"]["trained"] == 16
    assert summary["rl"]["ledger"]["in_flight"] == 0


# --- a run with a user's own algorithm and reward ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> EndedRun:
    """The README's algorithm, in a folder of the user's own, with a reward that raises after the first step."""
    folder = tmp_path_factory.mktemp("user")
    readme = (REPOSITORY / "README.md").read_text()
    [code] = re.findall(r"```python\n(# mine/reinforce\.py\n.*?)```", readme, re.DOTALL)
    [yaml] = re.findall(r"```yaml\n(# mine/algorithm/reinforce\.yaml\n.*?)```", readme, re.DOTALL)
    (folder / "mine" / "algorithm").mkdir(parents=True)
    (folder / "mine" / "reinforce.py").write_text(code)
    (folder / "mine" / "algorithm" / "reinforce.yaml").write_text(yaml)
    overrides = (
        *("algorithm=reinforce", *SMALL, "algorithm.offset=0.3", "~stages.sft", "stages.rl.steps=100"),
        *("stages.rl.evaluate_every=0", "rollouts.max_completion_tokens=8", "tracking=local", "run_root=runs"),
        *component(write_rewards(folder), "broken"),
        f"rewards.components.broken.params.metrics={folder}/runs/latest/metrics.jsonl",
    )
    command = [sys.executable, str(REPOSITORY / "launch.py"), "--config-dir", "mine", *overrides]
    watch = Watch(folder / "runs")
    return watch.ended(started(command, folder))


def test_the_readmes_algorithm_trains_from_a_folder_outside_the_repository(stopped: EndedRun) -> None:
    step, *_ = [record for record in metrics(stopped.root, "rl") if "policy/loss" in record]
    # Nothing is correct after no training: every advantage is -0.3.
    assert step["advantage/abs_mean"] == pytest.approx(0.3, abs=0.05)
    assert step["optim/grad_norm"] > 0
    events = [json.loads(line) for line in (stopped.folder / "ledger.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "trained" and event["detail"] == 0 for event in events) == 4


def test_a_reward_that_raises_stops_the_run_with_its_authors_traceback(stopped: EndedRun) -> None:
    assert stopped.code == 1
    assert "my_rewards.py" in stopped.output
    assert 'return lookup["a key that is not there"]' in stopped.output
    assert "KeyError" in stopped.output
    assert stopped.left == []


# --- interrupted runs -------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_every_process(tmp_path: Path, plugins: Path) -> None:
    """SIGINT to one run and SIGTERM to another, which starts while the first does: both take little longer than one."""
    before, folders = shared_memory(), ray_folders()
    first, second = tmp_path / "first", tmp_path / "second"
    overrides = (*component(plugins, "spread"), "stages.sft.steps=5000", "tracking=local")
    with ExitStack() as stack:
        interrupted = start(first, *overrides)
        stack.callback(stop, interrupted)
        # Ray gives its own processes 30 s to start: not two Rays at the same time.
        until((first / "latest" / "logs" / "learner-0.log").exists, interrupted)
        terminated = start(second, *overrides, "training.ranks=1")
        stack.callback(stop, terminated)
        for root, process, number in ((first, interrupted, signal.SIGINT), (second, terminated, signal.SIGTERM)):
            until(partial(trains, root), process)
            process.send_signal(number)
            code, output = finish(process, 120)
            assert code == 130, output
            assert left_behind(root, ray_folders()) == []
    assert left_behind(tmp_path, folders) == []
    assert shared_memory() <= before


def trains(root: Path) -> bool:
    return (root / "latest" / "metrics.jsonl").exists() and bool(metrics(root, "sft"))


def until(happened: Callable[[], bool], process: subprocess.Popen, within_s: float = 200) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
