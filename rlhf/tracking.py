"""Where the figures of a run go: JSON lines in the run directory, which are the record, and W&B beside them.

The only file that imports wandb. A W&B failure never stops a run and is never silent: it is reported once, W&B is left
alone from then on, and every call that did not reach it is counted.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.config import TrackingConfig, WandbConfig
from rlhf.errors import NonFiniteError
from rlhf.jsonl import JsonLines
from rlhf.samples import Abstained, RewardFailed, RewardValue, Sample, ScoredGroup

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SAMPLE_COLUMNS = (
    "prompt",
    "completion",
    "reward",
    "parts",
    "versions",
    "advantage",
    "finish_reason",
    "correct",
    "group_id",
    "sample_id",
    "answer",
    "metadata",
    "ledger_state",
    "note",
)
_LINE_KEYS = ("stage", "step", "time_s")
_FINISH_DEADLINE_S = 120.0

Report = Callable[[str], None]


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class Tracker:
    """Appends to `metrics.jsonl` and `samples.jsonl` in `run_dir` and mirrors both to W&B unless its mode is disabled.

    A resumed run appends to the same files; where a step occurs twice, the later line is the valid one.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        run_config: Mapping[str, Any],
        code_version: str,
        report: Report = _to_stderr,
        run_id: str | None = None,
    ) -> None:
        """`run_id`: the W&B run to go on with."""
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._samples = JsonLines(run_dir / SAMPLES_FILE)
        self.run_id = run_id or secrets.token_hex(8)
        tracked = {**run_config, "code_version": code_version}
        self._wandb = _Wandb(config.wandb, run_dir, tracked, report, self.run_id)

    def record_bytes(self) -> dict[str, int]:
        """How much of each file has been written."""
        return {METRICS_FILE: self._metrics.size, SAMPLES_FILE: self._samples.size}

    @property
    def wandb_lost_calls(self) -> int:
        """Calls that W&B did not get; 0 while it works."""
        return self._wandb.lost_calls

    def log(self, metrics: Mapping[str, float | int], *, stage: str, step: int) -> None:
        """One line `{"stage", "step", "time_s" (Unix), **metrics}` is on disk. NonFiniteError names a NaN."""
        clash = [key for key in metrics if key in _LINE_KEYS]
        assert not clash, f"metric names {clash} are taken by the line itself"
        numbers = {key: _finite(value, key, stage, step) for key, value in metrics.items()}
        self._metrics.append({"stage": stage, "step": step, "time_s": round(time.time(), 3), **numbers})
        self._wandb.log(numbers, stage, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, stage: str, step: int) -> None:
        """One line for each row, and one W&B table. Rows have exactly the keys SAMPLE_COLUMNS; see `sample_rows`."""
        for row in rows:
            assert set(row) == set(SAMPLE_COLUMNS), f"a sample row has the wrong keys: {set(row) ^ set(SAMPLE_COLUMNS)}"
            self._samples.append({"stage": stage, "step": step, **row})
        self._wandb.log_table(rows, stage, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """The final figures are in W&B's run summary. The run's own `summary.json` is written by the pipeline."""
        self._wandb.summary(values)

    def close(self, ok: bool) -> None:
        """Files closed, W&B run marked finished or failed, its process gone."""
        self._metrics.close()
        self._samples.close()
        self._wandb.close(ok)


def sample_rows(
    scored: ScoredGroup, advantages: Sequence[float] | None, ledger_state: str, correct_at: float
) -> list[dict[str, Any]]:
    """The rows of one group for `Tracker.log_samples`.

    `advantages` has one entry for each sample, None for a group that did not train. `reward`, `parts` and `correct` are
    None where the reward abstained or failed; `note` then says why.
    """
    shown = advantages if advantages is not None else [None] * len(scored.outcomes)
    texts = [sample.completion for sample in scored.group.stored.text().samples]
    rows = zip(scored.group.samples, texts, scored.outcomes, shown, strict=True)
    return [
        {
            "prompt": scored.group.prompt.text,
            "completion": completion,
            "versions": _versions(sample),
            "advantage": None if advantage is None else float(advantage),
            "finish_reason": sample.finish_reason,
            "group_id": scored.group.group_id,
            "sample_id": sample.sample_id,
            "answer": scored.group.prompt.answer,
            "metadata": dict(scored.group.prompt.metadata),
            "ledger_state": ledger_state,
            **_outcome_columns(outcome, correct_at),
        }
        for sample, completion, outcome, advantage in rows
    ]


def _outcome_columns(outcome: RewardValue | Abstained | RewardFailed, correct_at: float) -> dict[str, Any]:
    match outcome:
        case RewardValue(value=value, task=task, parts=parts, reason=reason):
            return {"reward": value, "parts": dict(parts), "correct": task >= correct_at, "note": reason}
        case Abstained(component=component, reason=reason):
            note = f"{component} abstained: {reason}"
        case RewardFailed(component=component, message=message, attempts=attempts):
            note = f"{component} failed {attempts} times: {message}"
    return {"reward": None, "parts": None, "correct": None, "note": note}


def _versions(sample: Sample) -> str:
    """`3`, or `3 to token 20, 4 to token 41` where the weights changed on the way."""
    spans = sample.version_spans
    if len(spans) == 1:
        return str(spans[0].version)
    return ", ".join(f"{span.version} to token {span.end}" for span in spans)


def _finite(value: float | int, key: str, stage: str, step: int) -> float | int:
    number = int(value) if isinstance(value, int) else float(value)
    if not math.isfinite(number):
        raise NonFiniteError(
            f"{key} = {number} in stage {stage}, step {step}: a metric must be finite. What follows from it cannot be "
            "trusted. Look at the line before it in metrics.jsonl; a rising optim/grad_norm is the usual first sign."
        )
    return number


class _Wandb:
    """One W&B run, or none. Every call goes through `_attempt`, the only place that knows what a failure means."""

    def __init__(
        self, config: WandbConfig, run_dir: Path, run_config: Mapping[str, Any], report: Report, run_id: str
    ) -> None:
        self.lost_calls = 0
        self._report = report
        self._stages: set[str] = set()
        self._module: ModuleType | None = None
        self._run: Any = None
        self._variables: list[str] = []
        if config.mode != "disabled":
            self._attempt("init", lambda: self._init(config, run_dir, run_config, run_id))

    def log(self, metrics: Mapping[str, float | int], stage: str, step: int) -> None:
        self._when_running(
            "log", lambda: self._log({f"{stage}/{key}": value for key, value in metrics.items()}, stage, step)
        )

    def log_table(self, rows: Sequence[Mapping[str, Any]], stage: str, step: int) -> None:
        self._when_running("log_samples", lambda: self._log({f"{stage}/samples": self._table(rows)}, stage, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._when_running("summary", lambda: self._run.summary.update(dict(values)))

    def close(self, ok: bool) -> None:
        if self._run is not None:
            self._attempt("finish", lambda: self._run.finish(exit_code=0 if ok else 1))
        if self._module is not None:
            self._attempt("teardown", self._module.teardown)
        for name in self._variables:
            os.environ.pop(name, None)
        if self.lost_calls:
            self._report(f"W&B did not get {self.lost_calls} calls of this run. {METRICS_FILE} has every figure.")

    def _init(self, config: WandbConfig, run_dir: Path, run_config: Mapping[str, Any], run_id: str) -> None:
        self._variables = _set_variables(run_dir)
        self._module = _import_wandb(config.mode)
        self._run = self._module.init(
            mode=config.mode,
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags),
            id=run_id,
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(run_config),
            settings=self._module.Settings(**_settings(config.mode)),
        )

    def _log(self, values: dict[str, Any], stage: str, step: int) -> None:
        """W&B's own step counts calls and stays monotonic over stages; what is plotted runs over `<stage>/step`."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({**values, f"{stage}/step": step})

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        assert self._module is not None
        cells = [[_cell(row[column]) for column in SAMPLE_COLUMNS] for row in rows]
        return self._module.Table(columns=list(SAMPLE_COLUMNS), data=cells)

    def _when_running(self, what: str, action: Callable[[], Any]) -> None:
        if self._run is not None:
            self._attempt(what, action)
        elif self.lost_calls:
            self.lost_calls += 1

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  wandb raises errors of many families, a broken pipe among them
            if not self.lost_calls:
                self._report(
                    f"W&B failed in {what} ({type(error).__name__}: {error}). The run goes on without it; "
                    f"{METRICS_FILE} has every figure."
                )
            self.lost_calls += 1
            self._run = None


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value


def _set_variables(run_dir: Path) -> list[str]:
    """Sets what wandb reads at import and when its service starts, and returns the names; the user's values win."""
    folder = run_dir.resolve() / "wandb"
    wanted = {
        "WANDB_ERROR_REPORTING": "false",  # else it reports its own crashes over the network
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_DATA_DIR": str(folder / "data"),
    }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    return list(missing)


def _import_wandb(mode: str) -> ModuleType:
    import wandb

    if mode == "online" and not wandb.api.api_key:
        raise RuntimeError("no API key, and a run must not wait at a login prompt; set WANDB_API_KEY")
    return wandb


def _settings(mode: str) -> dict[str, Any]:
    """Nothing on the console; offline also nothing that looks at the network (cloud metadata, machine statistics)."""
    quiet = {"silent": True, "console": "off", "init_timeout": 60.0}
    if mode == "offline":
        return {
            **quiet,
            "disable_git": True,
            "disable_code": True,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
        }
    return {**quiet, "finish_timeout": _FINISH_DEADLINE_S, "finish_timeout_raises": True}
