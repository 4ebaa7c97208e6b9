"""The stages of a run, in order: each starts from the weights the one before left; those that train end evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import (
    CollectStage,
    FilterStage,
    PreferenceStage,
    RlStage,
    SftStage,
    TrainingStage,
)
from rlhf.stages import collect, preference, prefilter, rl, sft
from rlhf.stages.context import Context, Outcome

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
    """Runs the stages and gathers what `summary.json` says."""

    context: Context
    stages: list[dict[str, Any]] = field(default_factory=list)
    evaluations: Evaluations = field(default_factory=dict)
    rl: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """All stages. The policy of each that trains is left in `checkpoints/<stage>`, that of the last in `policy`."""
        stages = self.context.config.stages
        training = [name for name, stage in stages.items() if isinstance(stage, TrainingStage)]
        self._start()
        for name, stage in stages.items():
            started = time.monotonic()
            outcome = RUN[type(stage)](self.context, name, stage)
            self._record(name, outcome, time.monotonic() - started)
            if isinstance(stage, TrainingStage):
                folder = "policy" if name == training[-1] else f"checkpoints/{name}"
                self.context.policy = self.context.run_dir / folder
                self.context.parts.learners.save_policy(self.context.policy)
                self._evaluate(name)

    def _start(self) -> None:
        """The first weight version: what the engines loaded is proven to be what the learners hold."""
        context = self.context
        context.parts.learners.load_model(context.policy)
        context.parts.connect()
        context.publish()
        if context.config.evaluation.before:
            self._evaluate("before")

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
