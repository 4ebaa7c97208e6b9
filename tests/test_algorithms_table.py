"""The benchmark of all algorithms, without a run: what it would run, how it resumes, its statistics and its page."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import algorithms_table as table
from rlhf import algorithms
from rlhf.algorithms.page import default_needs
from rlhf.config import CollectStage, PreferenceStage, RlStage, RunConfig

QUICK = ("model", "data", "training", "rollouts", "rewards", "cluster")

every_algorithm = pytest.mark.parametrize("name", table.benchmarked())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results and runs of a test are in a folder of its own."""
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results" / "algorithms.json")
    monkeypatch.setattr(table, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(table, "composed", lambda arguments: composed_once(tuple(arguments)))
    return tmp_path


@cache
def composed_once(arguments: tuple[str, ...], compose: Callable[..., RunConfig] = table.composed) -> RunConfig:
    """The configuration of these arguments. The base of a seed is asked for by nearly every test."""
    return compose(arguments)


def row(name: str = "grpo", seed: int = 0, before: float = 0.4, after: float = 0.6, **more: Any) -> dict[str, Any]:
    """A finished row whose two evaluations have a standard error of 0.03 and 0.04: 0.05 of the gain."""
    first = {"pass@1": before, "pass@1_stderr": 0.03, "greedy": before}
    last = {"pass@1": after, "pass@1_stderr": 0.04, "greedy": after}
    rest = {"rl_steps": 40, "optimiser_steps": 80, "rollout_tokens": 1000, "trained_tokens": 900, "seconds": 60.0}
    rest |= {"command": "python launch.py", "date": "2026-01-02T03:04:05", "machine": "a CPU", "code": "abc"}
    named = {"algorithm": name, "seed": seed, "status": "finished", "completion_tokens": 20.0}
    return named | rest | {"before": first, "after": last} | table.gain(first, last) | more


# --- what is run ------------------------------------------------------------------------------------------------------


@every_algorithm
def test_every_algorithm_has_a_run_that_composes_and_validates(name: str) -> None:
    config = table.composed(table.job(name, table.base_job(0)).arguments)
    assert config.algorithm.name == name
    online = default_needs(algorithms.algorithm(name)).rollouts
    kinds = [type(stage) for stage in config.stages.values()]
    assert kinds == ([RlStage] if online else [CollectStage, PreferenceStage])


def test_the_overrides_are_of_registered_algorithms() -> None:
    assert set(table.OVERRIDES) <= set(table.benchmarked())


def test_the_base_is_the_first_stage_of_the_quickstart() -> None:
    quickstart, base = table.composed(["experiment=quickstart"]), table.composed(table.base_job(0).arguments)
    assert base.stages == {"sft": quickstart.stages["sft"]}
    assert sections(base, QUICK) == sections(quickstart, QUICK)


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_the_runs_have_the_settings_of_the_quickstart_apart_from_the_weights(name: str) -> None:
    quickstart = table.composed(["experiment=quickstart"])
    config = table.composed(table.job(name, table.base_job(0)).arguments)
    assert sections(config, QUICK[1:]) == sections(quickstart, QUICK[1:])
    assert (config.model.dtype, config.model.max_context_tokens) == ("float32", quickstart.model.max_context_tokens)
    assert (config.evaluation.prompts, config.evaluation.samples_per_prompt) == (400, 8)


def sections(config: RunConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def test_the_hash_is_of_what_decides_the_result_and_of_nothing_else() -> None:
    arguments = ["experiment=algorithms_online", "algorithm=grpo", "model.path=somewhere"]
    usual = table.digest(table.composed(arguments))
    same = ["run_root=/tmp/other", "tracking=local", "algorithm.clip_low=0.2"]
    different = [
        "seed=1",
        "++algorithm.clip_low=0.1",
        "stages.rl.steps=30",
        "model.path=elsewhere",
        "algorithm=grpo_icepop",
    ]
    assert {table.digest(table.composed([*arguments, f"++{a}" if "clip" in a else a])) for a in same} == {usual}
    hashes = {table.digest(table.composed([*arguments, argument])) for argument in different}
    assert len(hashes | {usual}) == len(different) + 1


def test_a_run_starts_from_the_base_of_its_seed() -> None:
    first, second = table.base_job(0), table.base_job(1)
    assert first.digest != second.digest
    assert f"model.path={second.policy}" in table.job("grpo", second).arguments
    assert table.job("grpo", first).key != table.job("grpo", second).key


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experiments and algorithms that would have been run, each of which ends well."""
    started: list[str] = []

    def execute(command: list[str], log: Path) -> int:
        started.append(next((a for a in command if a.startswith("algorithm=")), command[2]))
        run_dir = log.parent / "latest"
        (run_dir / "policy").mkdir(parents=True, exist_ok=True)
        (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
        return 0

    monkeypatch.setattr(table, "execute", execute)
    monkeypatch.setattr(table, "costs", lambda *arguments: {})
    return started


EVALUATION = {"pass@1": 0.5, "pass@1_stderr": 0.01, "greedy": 0.6, "completion_tokens_mean": 12.5}
SUMMARY = {
    "stages": [{"name": "rl", "steps": 40, "trained_tokens": 900, "rl": {"rollout_tokens": 1000}}],
    "evaluation": {"rl": EVALUATION},
    "versions": {"code": "abc"},
}
METRICS = [
    {"stage": "rl", "policy/clip_fraction": 0.1, "mismatch/masked_fraction": 0.0},
    {"stage": "rl", "policy/clip_fraction": 0.3, "mismatch/masked_fraction": 0.0},
]


def test_a_finished_run_is_never_run_again(runs: list[str]) -> None:
    assert table.run_all(["grpo"], [0]) == 0
    assert runs == ["experiment=algorithms_base", "algorithm=grpo"]
    assert table.run_all(["grpo", "dpo"], [0]) == 0
    assert runs[2:] == ["algorithm=dpo"]
    assert {row["status"] for row in table.load().values()} == {"finished"}


def test_other_settings_are_another_run(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table.run_all(["grpo"], [0])
    monkeypatch.setattr(table, "OVERRIDES", {"grpo": ("stages.rl.steps=30",)})
    table.run_all(["grpo"], [0])
    assert runs[2:] == ["algorithm=grpo"]
    assert len(table.load()) == 3


def test_a_base_whose_checkpoint_is_gone_is_trained_again(runs: list[str]) -> None:
    table.run_all([], [0])
    (table.base_job(0).policy).rmdir()
    table.run_all([], [0])
    assert runs == ["experiment=algorithms_base"] * 2


def test_a_failed_run_is_recorded_with_the_end_of_its_log_and_tried_again(
    runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table.run_all([], [0])
    works = table.execute

    def fails(command: list[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(f"line {n} of {table.ROOT}/x\n" for n in range(99)))
        return 3

    monkeypatch.setattr(table, "execute", fails)
    assert table.run_all(["grpo"], [0]) == 1
    failed = next(row for row in table.load().values() if row["algorithm"] == "grpo")
    assert (failed["status"], failed["exit_status"], len(failed["log_tail"])) == ("failed", 3, table.TAIL_LINES)
    assert failed["log_tail"][-1] == "line 98 of ./x"
    monkeypatch.setattr(table, "execute", works)
    assert table.run_all(["grpo"], [0]) == 0
    assert {row["status"] for row in table.load().values()} == {"finished"}


def test_without_a_base_no_algorithm_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fails(command: list[str], log: Path) -> int:
        commands.append(command)
        log.parent.mkdir(parents=True)
        log.write_text("")
        return 1

    monkeypatch.setattr(table, "execute", fails)
    assert table.run_all(["grpo", "dpo"], [0, 1]) == 2
    assert len(commands) == 2


def test_an_interrupted_command_ends_before_the_benchmark_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    os.kill(os.getppid(), signal.SIGUSR1)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('cleaned up', flush=True)\n"
    )

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            table.execute(["python", str(program)], tmp_path / "output.log")
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert (tmp_path / "output.log").read_text() == "cleaned up\n"


def test_the_output_and_the_status_of_a_command_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "a" / "output.log"
    assert table.execute(["python", "-c", "import sys; print('here'); sys.exit(5)"], log) == 5
    assert log.read_text() == "here\n"


def test_a_second_benchmark_is_refused() -> None:
    with table.only_one(), pytest.raises(SystemExit, match="running already"), table.only_one():
        pass


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_costs_are_read_from_the_records_of_the_run() -> None:
    config = table.composed(["experiment=algorithms_online", "algorithm=grpo", "++stages.rl.updates_per_step=2"])
    row = table.costs(config, SUMMARY["stages"], METRICS)
    assert (row["rl_steps"], row["optimiser_steps"]) == (40, 80)
    assert (row["rollout_tokens"], row["trained_tokens"]) == (1000, 900)
    assert (row["clip_fraction"], row["masked_fraction"]) == (pytest.approx(0.2), 0.0)


def test_a_collect_stage_counts_its_samples_and_no_optimiser_steps() -> None:
    config = table.composed(["experiment=algorithms_offline", "algorithm=dpo"])
    stages = [
        {"name": "collect", "steps": 0, "trained_tokens": 0},
        {"name": "preference", "steps": 32, "trained_tokens": 70},
    ]
    lines = [{"stage": "collect", "rollout/samples": 8, "rollout/completion_tokens": 2.5}]
    row = table.costs(config, stages, lines)
    assert (row["rl_steps"], row["optimiser_steps"], row["rollout_tokens"], row["trained_tokens"]) == (0, 32, 20, 70)


def test_a_gain_is_measured_in_the_root_of_the_summed_squared_errors() -> None:
    assert row()["gain"] == pytest.approx(0.2)
    assert row()["gain_stderr"] == pytest.approx(0.05)
    assert row()["gain_in_stderr"] == pytest.approx(4.0)


def test_a_gain_without_any_error_is_still_a_number() -> None:
    nothing = {"pass@1": 0.0, "pass@1_stderr": 0.0}
    assert math.isfinite(table.gain(nothing, {"pass@1": 1.0, "pass@1_stderr": 0.0})["gain_in_stderr"])


def test_the_spread_over_seeds_is_the_standard_error_of_the_mean() -> None:
    assert table.mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    assert table.mean_and_error([1.0]) == (1.0, None)


def test_pooling_four_seeds_halves_the_error() -> None:
    assert table.pooled([row(seed=seed) for seed in range(4)]) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("afters", "expected"),
    [([0.6, 0.7], "improves"), ([0.6, 0.45], "unclear"), ([0.2, 0.1], "worsens"), ([0.2, 0.45], "unclear")],
)
def test_the_verdict_needs_every_seed(afters: list[float], expected: str) -> None:
    assert table.verdict([row(seed=seed, after=after) for seed, after in enumerate(afters)]) == expected


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_has_a_line_for_each_algorithm_with_spread_gain_and_verdict() -> None:
    rows = {"a": row(seed=0), "b": row(seed=1, after=0.8, clip_fraction=0.125), "c": row("dpo", after=0.45)}
    rows["d"] = {"algorithm": "simper", "seed": 0, "status": "failed"}
    rows["e"] = row(table.BASE)
    text = table.render(rows)
    assert "| `grpo` | 2 | 0.400 ± 0.000 | 0.700 ± 0.100 | 0.400 ± 0.000 | 0.700 ± 0.100 | +0.300 ± 0.100 |" in text
    assert "| +8.5 | improves |" in text
    assert "| `dpo` | 1 | 0.400 | 0.450 | 0.400 | 0.450 | +0.050 | +1.0 | unclear |" in text
    assert "| 12.50% | - |" in text
    assert "`simper` seed 0" in text and "`sft`" not in text
    assert "a CPU" in text and "2026-01-02" in text


def test_of_two_configurations_the_newer_finished_one_is_shown() -> None:
    rows = {"new": row(after=0.9, date="2026-02-01T00:00:00"), "old": row(after=0.5)}
    rows["newest"] = {"algorithm": "grpo", "seed": 0, "status": "failed", "date": "2026-03-01T00:00:00"}
    assert [r["after"]["pass@1"] for r in table.newest(rows.values())["grpo"]] == [0.9]


def test_without_results_the_page_says_how_to_get_them(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "ROOT", elsewhere)
    monkeypatch.setattr(table, "PAGE", elsewhere / "docs" / "algorithms_table.md")
    assert table.main(["--render"]) == 0
    assert "make algorithms-table" in table.PAGE.read_text()


def test_an_unknown_algorithm_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        table.main(["--only", "grop"])
    assert "grop" in capsys.readouterr().err


def test_rows_name_the_machine_and_no_place_on_it() -> None:
    assert " cores, " in table.machine()
    assert str(table.ROOT) not in " ".join(table.job("grpo", table.base_job(0)).command[:2])
    assert sys.prefix not in table.machine()
