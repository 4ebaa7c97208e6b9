"""The stages of a run, in order: each starts from the weights the one before left; those that train end evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.checkpoints.resume import require_same_data
from rlhf.checkpoints.saver import LEARNER
from rlhf.checkpoints.store import Checkpoint
from rlhf.config import (
    CollectStage,
    FilterStage,
    PreferenceStage,
    RlStage,
    SftStage,
    TrainingStage,
)
from rlhf.ledger import FILE_NAME as LEDGER_FILE
from rlhf.stages import collect, preference, prefilter, rl, sft
from rlhf.stages.context import Context, Outcome
from rlhf.training.model_files import state_bytes

RUN: Mapping[type, Callable[[Context, str, Any], Outcome]] = {
    SftStage: sft.run,
    RlStage: rl.run,
    FilterStage: prefilter.run,
    CollectStage: collect.run,
    PreferenceStage: preference.run,
}

Evaluations = dict[str, dict[str, Any]]


@dataclass(slots=True)
class Pipeline:
    """Runs the stages and gathers what `summary.json` says.

    `data` are the fingerprints of the stages' data before any filter.
    """

    context: Context
    stages: list[dict[str, Any]] = field(default_factory=list)
    evaluations: Evaluations = field(default_factory=dict)
    rl: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """All stages that are left.

        The policy of each that trains is left in `policies/<stage>`, that of the last in `policy`.
        """
        stages = self.context.config.stages
        names = list(stages)
        training = [name for name, stage in stages.items() if isinstance(stage, TrainingStage)]
        self.data = {name: self.context.parts.data.fingerprint(name) for name in names}
        resumed = self.context.checkpoints.resumed
        size, keep = state_bytes(self.context.policy), self.context.config.checkpoints.keep
        self.context.checkpoints.begin(self.context.parts.learners, self._state, size)
        if size > 1 << 30:
            most = f"{(keep + 1) * size / (1 << 30):.1f} GiB at most"
            self.context.console.note(f"checkpoints: {size / (1 << 30):.1f} GiB each, {most} while one is written")
        first = 0 if resumed is None else names.index(resumed.checkpoint.state["stage"])
        if resumed is None:
            self._start()
            if isinstance(stages[names[0]], RlStage):
                self.context.checkpoints.save(names[0], 0, {})  # for the journal to go on from
        else:
            self._resume(resumed.checkpoint)
        for name in names[first:]:
            stage = stages[name]
            started = time.monotonic()
            outcome = RUN[type(stage)](self.context, name, stage)
            self._record(name, outcome, time.monotonic() - started)
            if isinstance(stage, TrainingStage):
                folder = "policy" if name == training[-1] else f"policies/{name}"
                self.context.policy = self.context.run_dir / folder
                self.context.parts.learners.save_policy(self.context.policy)
                self._evaluate(name)
            if name != names[-1]:
                self.context.checkpoints.save(names[names.index(name) + 1], 0, {})

    def _start(self) -> None:
        """The first weight version: what the engines loaded is proven to be what the learners hold."""
        context = self.context
        context.parts.learners.load_model(context.policy)
        context.parts.connect()
        context.publish()
        if context.config.evaluation.before:
            self._evaluate("before")

    def _resume(self, checkpoint: Checkpoint) -> None:
        """The learners as they were at the checkpoint, and the engines with their weights."""
        context, state = self.context, checkpoint.state
        require_same_data(state["data"], self.data)
        self.stages, self.evaluations, self.rl = state["stages"], state["evaluations"], state["rl"]
        for name, indices in state["kept"]:
            context.keep(name, indices)
        for name, (path, picked) in state["preferences"].items():
            context.collected[name] = context.run_dir / path
            context.records[name] = list(context.parts.data.read_preferences(context.collected[name]))[:picked]
        context.policy = context.run_dir / state["policy"]
        context.parts.learners.load_model(context.policy)
        context.parts.learners.load_state(checkpoint.path / LEARNER)
        context.parts.connect()
        # The first sync gives the weights the version they had.
        context.parts.publisher.version = state["version"] - 1
        context.publish()
        context.console.note(f"resumed from {checkpoint.path}")

    def _state(self) -> dict[str, Any]:
        """What a checkpoint has of the run beside its learners and the stage; see `_resume`."""
        context = self.context
        preferences = {
            name: (_below(path, context.run_dir), len(context.records[name]))
            for name, path in context.collected.items()
        }
        return {
            "stages": self.stages,
            "evaluations": self.evaluations,
            "rl": self.rl,
            "data": self.data,
            "kept": context.kept,
            "preferences": preferences,
            "policy": _below(context.policy, context.run_dir),
            "version": context.parts.publisher.version,
            "record_bytes": {**context.tracker.record_bytes(), LEDGER_FILE: _size(context.run_dir / LEDGER_FILE)},
            "tracker_run_id": context.tracker.run_id,
        }

    def _record(self, name: str, outcome: Outcome, seconds: float) -> None:
        self.stages.append(
            {
                "name": name,
                "seconds": seconds,
                "steps": outcome.steps,
                "trained_tokens": outcome.trained_tokens,
                **outcome.figures,
            }
        )
        # `rl` of the summary is that of the last RL stage; with several, each stage's own figures are in `stages`.
        self.rl = outcome.figures.get("rl", self.rl)

    def _evaluate(self, name: str) -> None:
        context, modes = self.context, self.context.parts.modes
        results = {mode: context.evaluate(context.config.evaluation.prompts, mode) for mode in modes}
        entry: dict[str, Any] = dict(results[modes[0]])
        if len(results) > 1:
            entry["non_reasoning"] = results[not modes[0]]
        self.evaluations[name] = entry
        flat = {f"evaluation/{key}": value for key, value in results[modes[0]].items()}
        for mode in modes[1:]:
            flat |= {f"evaluation/non_reasoning/{key}": value for key, value in results[mode].items()}
        step = self.stages[-1]["steps"] if self.stages else 0
        context.tracker.log(flat, stage=name, step=step)

    def result_rows(self) -> dict[str, Mapping[str, float]]:
        """The evaluations as rows of the result table: one for each stage and mode."""
        rows: dict[str, Mapping[str, float]] = {}
        for mode in ("reasoning", "non_reasoning"):
            for name, entry in self.evaluations.items():
                if mode == "non_reasoning" and mode in entry:
                    rows[f"{name}/{mode}"] = entry[mode]
                elif mode == "reasoning":
                    rows[f"{name}/{mode}" if len(self.context.parts.modes) > 1 else name] = entry
        return rows


def _below(path: Path, folder: Path) -> str:
    """`path` from `folder` on, so that a run can be moved; absolute where it lies elsewhere."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
