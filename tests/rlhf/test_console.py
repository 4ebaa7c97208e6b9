"""What a person reads: plain lines in a pipe, a live display on a terminal, errors without a stack trace."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rlhf import console as module
from rlhf.console import RunConsole
from rlhf.errors import ConfigError, DeadlineError

METRICS = {"reward/mean": 0.5, "reward/std": 0.1, "rollout/completion_tokens": 19.5, "optim/grad_norm": 0.25}
PHASES = {"rollout": 0.61, "update": 0.3, "sync": 0.06}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def figures(pass_at_1: float, **more: float) -> dict[str, float]:
    shape = {"completion_tokens_mean": 9.43, "truncated_fraction": 0.002, "thinks_fraction": 0.331, "unscored": 0}
    return {
        "greedy": 0.9,
        "pass@1": pass_at_1,
        "pass@1_stderr": 0.012,
        "pass@10": 0.97,
        "n_prompts": 400,
        **shape,
        **more,
    }


def test_the_plan_shows_every_section_and_value(stream: io.StringIO) -> None:
    RunConsole(stream).plan(
        {"run": {"seed": 0, "dry run": False}, "stages": [("sft", "600 steps"), ("tags", ("a", "b"))]}
    )
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[0] == ["run", "seed", "0"]
    assert lines[1] == ["dry", "run", "no"]
    assert lines[2] == ["stages", "sft", "600", "steps"]
    assert lines[3] == ["tags", "a,", "b"]


def test_square_brackets_are_text_not_markup(stream: io.StringIO) -> None:
    run = RunConsole(stream)
    run.plan({"template": {"user": "[|user|]", "bold": "[bold]"}})
    run.note("[red]note")
    run.error(DeadlineError("[engine-0] gone"))
    for text in ("[|user|]", "[bold]", "[red]note", "[engine-0] gone"):
        assert text in stream.getvalue()


def test_a_pipe_gets_a_line_every_five_percent(stream: io.StringIO, clock: list[float]) -> None:
    with RunConsole(stream).stage("rl", 100) as progress:
        for step in range(1, 101):
            clock[0] += 0.1
            progress.advance(step, METRICS, PHASES)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/100", "6/100", "11/100"]
    assert lines[-1].startswith("rl 100/100 |")
    assert lines[-1].endswith("took 10 s")
    assert len(lines) == 21


def test_a_pipe_gets_a_line_after_ten_seconds_when_steps_are_slow(stream: io.StringIO, clock: list[float]) -> None:
    with RunConsole(stream).stage("rl", 1000) as progress:
        for step in range(1, 11):
            clock[0] += 6.0
            progress.advance(step, METRICS, PHASES)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [f"{n}/1000" for n in (1, 3, 5, 7, 9)]


def test_a_line_has_key_metrics_phase_times_and_time_left(stream: io.StringIO, clock: list[float]) -> None:
    with RunConsole(stream).stage("rl", 10) as progress:
        for step in (1, 2):
            clock[0] += 30.0
            progress.advance(step, METRICS, PHASES)
    assert stream.getvalue().splitlines()[-1] == (
        "rl 2/10 | reward/mean 0.5  rollout/completion_tokens 19.5  optim/grad_norm 0.25 | "
        "rollout 0.61 s, update 0.30 s, sync 0.06 s | 4 min 00 s left"
    )


def test_a_stage_without_known_metrics_shows_its_own(stream: io.StringIO) -> None:
    with RunConsole(stream).stage("x", 1) as progress:
        progress.advance(1, {"a": 1.0, "b": 123456.0, "c": 1e-7}, {})
    assert "a 1  b 123,456  c 1e-07" in stream.getvalue()


def test_a_terminal_gets_a_bar_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with RunConsole(stream).stage("sft", 2) as progress:
        progress.advance(1, METRICS, PHASES)
        progress.advance(2, METRICS, PHASES)
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "2/2" in text
    assert "reward/mean 0.5" in text


def test_the_result_table_has_a_row_for_each_stage_and_mode(stream: io.StringIO) -> None:
    rows = {"before": figures(0.0), "sft": figures(0.541), "rl": figures(0.87)}
    RunConsole(stream).result_table(rows)
    text = stream.getvalue()
    row = next(line for line in text.splitlines() if line.startswith("rl"))
    assert row.split() == ["rl", "0.900", "0.870", "±", "0.012", "0.970", "9.4", "0.2", "%", "33.1", "%"]
    assert "pass@1: 0.000 -> 0.870 (+0.870)" in text
    assert "mode" not in text
    assert "unscored" not in text


def test_modes_get_a_column_and_a_gain_of_their_own(stream: io.StringIO) -> None:
    RunConsole(stream).result_table(
        {
            "before/reasoning": figures(0.1),
            "rl/reasoning": figures(0.9),
            "before/non_reasoning": figures(0.2),
            "rl/non_reasoning": figures(0.3),
        }
    )
    assert "pass@1 (reasoning): 0.100 -> 0.900 (+0.800)" in stream.getvalue()
    assert "pass@1 (non-reasoning): 0.200 -> 0.300 (+0.100)" in stream.getvalue()


def test_unscored_samples_are_shown_when_there_are_any(stream: io.StringIO) -> None:
    RunConsole(stream).result_table({"rl": figures(0.5, unscored=7)})
    assert "unscored" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("7")


def test_missing_figures_are_dashes(stream: io.StringIO) -> None:
    RunConsole(stream).result_table({"rl": {"pass@1": 0.5}})
    assert stream.getvalue().splitlines()[-1].split() == ["rl", "-", "0.500", "-", "-", "-"]


def test_a_config_error_lists_its_problems_unwrapped_and_without_a_stack_trace(stream: io.StringIO) -> None:
    problem = "rollouts.top_p = 0.9: must be 1.0. " + "A long reason. " * 20
    RunConsole(stream).error(ConfigError([problem, "b = 1: c. d. e."]))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "error: 2 problems in the configuration:"
    assert lines[1].strip() == f"- {problem}".strip()
    assert lines[2] == "  - b = 1: c. d. e."
    assert len(lines) == 3


def test_errors_go_to_stderr_and_results_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    run = RunConsole()
    run.error(DeadlineError("engine-0: no answer"))
    run.note("hello")
    captured = capsys.readouterr()
    assert captured.err == "error: engine-0: no answer\n"
    assert captured.out == "hello\n"


def test_the_last_line_names_the_summary(stream: io.StringIO, clock: list[float]) -> None:
    run = RunConsole(stream)
    clock[0] += 3723
    run.finish(Path("runs/" + "x" * 150 + "/summary.json"))
    lines = stream.getvalue().splitlines()
    assert lines[-2] == "finished in 1 h 02 min"
    assert lines[-1] == "summary: runs/" + "x" * 150 + "/summary.json"
