"""What a person at the terminal sees: the plan, live progress, the result table, errors that can be acted on.

On a terminal a stage is a live display; into a file or a pipe it is one plain line now and then. The last line of a
finished run names `summary.json`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.errors import ConfigError, GroupwiseError

Rows = Mapping[str, object] | Sequence[tuple[str, object]]
"""Keys and values, in order."""

Plan = Mapping[str, Rows] | Sequence[tuple[str, Rows]]
"""Sections and their rows, in order."""

KEY_METRICS = (
    "reward/mean",
    "rollout/completion_tokens",
    "policy/entropy_nats",
    "optim/grad_norm",
    "policy/loss",
    "perf/trained_tokens_per_s",
)
"""Shown while a stage runs, the first four there are; a stage that has none of them shows its own first four."""

_T = TypeVar("_T")
_SHOWN_METRICS = 4
_LINE_EVERY_S = 10.0
_LINE_EVERY_FRACTION = 0.05
_PIPE_WIDTH = 120


class RunConsole:
    """Writes to `stream`; without one to stdout, and errors to stderr."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._out = _console(stream or sys.stdout)
        self._errors = _console(stream or sys.stderr)
        self._started = time.monotonic()

    def plan(self, plan: Plan) -> None:
        """Prints (section, rows of key and value) as one compact table."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for section, rows in _pairs(plan):
            for index, (key, value) in enumerate(_pairs(rows)):
                table.add_row("" if index else section, Text(str(key)), Text(_plain(value)))
        self._out.print(table)

    @contextmanager
    def stage(self, name: str, total_steps: int) -> Iterator[StageProgress]:
        """Progress of one stage; call `advance` after every step."""
        progress = StageProgress(name, total_steps)
        if not self._out.is_terminal:
            progress.show = _LinePrinter(self._out)
            yield progress
            return
        with Live(progress, console=self._out, refresh_per_second=4):
            yield progress

    def result_table(self, evaluation: Mapping[str, Mapping[str, float]], title: str = "evaluation") -> None:
        """One row for each evaluation in order. Labels are `before`, a stage, or either with a mode: `rl/reasoning`.

        The figures are `EvaluationResult.as_summary()`. Below: what the first and the last of each mode differ by.
        """
        self._out.print(_result_table(evaluation, title))
        for line in _gains(evaluation):
            self._out.print(Text(line, style="bold"))

    def error(self, error: BaseException) -> None:
        """The message, without a stack trace; each problem of a ConfigError on a line of its own."""
        message = str(error) if isinstance(error, GroupwiseError) else f"{type(error).__name__}: {error}"
        heading = Text("error: ", style="bold red")
        if not isinstance(error, ConfigError):
            self._errors.print(heading + Text(message), soft_wrap=True)
            return
        self._errors.print(heading + Text(message.splitlines()[0]), soft_wrap=True)
        for problem in error.problems:
            self._errors.print(Text("  - ") + _problem(problem), soft_wrap=True)

    def note(self, text: str) -> None:
        self._out.print(Text(text), soft_wrap=True)

    def finish(self, summary_path: Path) -> None:
        """How long the run took; the last line names the summary file."""
        self._out.print(Text(f"finished in {_duration(time.monotonic() - self._started)}", style="green"))
        self._out.print(Text(f"summary: {summary_path}"), soft_wrap=True)


class StageProgress:
    """Where a stage is. `__rich__` is what a terminal shows, `line` what a log gets."""

    def __init__(self, name: str, total_steps: int) -> None:
        self.name = name
        self.total_steps = total_steps
        self.step = 0
        self.started = time.monotonic()
        self.show: _LinePrinter | None = None
        self._metrics: Mapping[str, float] = {}
        self._phases: Mapping[str, float] = {}
        self._first: tuple[int, float] | None = None

    def advance(self, step: int, metrics: Mapping[str, float], phase_seconds: Mapping[str, float]) -> None:
        """`step` steps (1 to total_steps) are done; `metrics` and `phase_seconds` are of the last one."""
        self.step, self._metrics, self._phases = step, dict(metrics), dict(phase_seconds)
        self._first = self._first or (step, time.monotonic())
        if self.show is not None:
            self.show(self)

    @property
    def left_s(self) -> float | None:
        """Seconds left at the pace since the first step, whose warm-up is not counted; None before the second step."""
        if self._first is None or self.step <= self._first[0]:
            return None
        pace = (time.monotonic() - self._first[1]) / (self.step - self._first[0])
        return pace * (self.total_steps - self.step)

    @property
    def figures(self) -> str:
        known = [key for key in KEY_METRICS if key in self._metrics] or list(self._metrics)
        return "  ".join(f"{key} {_number(self._metrics[key])}" for key in known[:_SHOWN_METRICS])

    @property
    def phases(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._phases.items())

    @property
    def time_left(self) -> str:
        if self.step == self.total_steps:
            return f"took {_duration(time.monotonic() - self.started)}"
        return "" if self.left_s is None else f"{_duration(self.left_s)} left"

    @property
    def line(self) -> str:
        parts = (f"{self.name} {self.step}/{self.total_steps}", self.figures, self.phases, self.time_left)
        return " | ".join(part for part in parts if part)

    def __rich__(self) -> Group:
        top = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total_steps, completed=self.step, width=30)
        count = Text(f"{self.step}/{self.total_steps}")
        top.add_row(Text(self.name, style="bold"), bar, count, Text(self.time_left, style="dim"))
        if not self.step:
            return Group(top, Text("  first step under way", style="dim"))
        return Group(top, Text(f"  {self.figures}"), Text(f"  {self.phases}", style="dim"))


class _LinePrinter:
    """Prints a stage's line at its first and last step, and after 10 s or 5 % of the steps, whichever comes first."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step = 0
        self._time = 0.0

    def __call__(self, progress: StageProgress) -> None:
        now = time.monotonic()
        moved = progress.step - self._step >= _LINE_EVERY_FRACTION * progress.total_steps
        first_or_last = self._step == 0 or progress.step == progress.total_steps
        if first_or_last or moved or now - self._time >= _LINE_EVERY_S:
            self._console.print(Text(progress.line), soft_wrap=True)
            self._step, self._time = progress.step, now


def _console(stream: IO[str]) -> Console:
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _problem(problem: str) -> Text:
    """`key = value: rule...` with the key in bold."""
    text = Text(problem)
    text.stylize("bold", 0, problem.find(":") if ":" in problem else 0)
    return text


def _result_table(evaluation: Mapping[str, Mapping[str, float]], title: str) -> Table:
    modes = any("/" in label for label in evaluation)
    ks = sorted({int(key[5:]) for figures in evaluation.values() for key in figures if re.fullmatch(r"pass@\d+", key)})
    unscored = any(figures.get("unscored") for figures in evaluation.values())
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("stage")
    if modes:
        table.add_column("mode")
    names = ["greedy", *(f"pass@{k}" for k in ks), "mean tokens", "truncated", "thinks", *(["unscored"] * unscored)]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for label, figures in evaluation.items():
        stage, mode = _split(label)
        cells = [_share(figures.get("greedy")), *(_with_error(figures, k) for k in ks), *_shape_cells(figures)]
        cells += [_number(figures["unscored"]) if "unscored" in figures else "-"] * unscored
        table.add_row(stage, *([mode] if modes else []), *cells)
    return table


def _shape_cells(figures: Mapping[str, float]) -> list[str]:
    tokens = figures.get("completion_tokens_mean")
    shares = [_percent(figures.get(name)) for name in ("truncated_fraction", "thinks_fraction")]
    return ["-" if tokens is None else f"{tokens:.1f}", *shares]


def _with_error(figures: Mapping[str, float], k: int) -> str:
    error = figures.get(f"pass@{k}_stderr")
    return _share(figures.get(f"pass@{k}")) + ("" if error is None else f" ± {error:.3f}")


def _gains(evaluation: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    by_mode: dict[str, list[tuple[str, float]]] = {}
    for label, figures in evaluation.items():
        if "pass@1" in figures:
            stage, mode = _split(label)
            by_mode.setdefault(mode, []).append((stage, figures["pass@1"]))
    for mode, points in by_mode.items():
        if len(points) > 1:
            start, end = points[0][1], points[-1][1]
            where = f" ({mode})" if mode else ""
            yield f"pass@1{where}: {start:.3f} -> {end:.3f} ({end - start:+.3f})"


def _split(label: str) -> tuple[str, str]:
    stage, _, mode = label.partition("/")
    return stage, mode.replace("_", "-")


def _pairs(rows: Mapping[str, _T] | Sequence[tuple[str, _T]]) -> list[tuple[str, _T]]:
    return list(rows.items()) if isinstance(rows, Mapping) else list(rows)


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000.0:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
