"""The stages of a run, in order: each starts from the weights the one before left and ends with an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf.algorithms import Algorithm, build
from rlhf.batches import UpdateReport, supervised_batch
from rlhf.config import RlStage, RunConfig, SftStage
from rlhf.console import RunConsole
from rlhf.controller import Controller, StepRecord, sample_advantages, step_metrics
from rlhf.ledger import Ledger
from rlhf.phases import GpuTurns, Phases
from rlhf.protocols import Evaluator, LearnerGroup, Publisher, RolloutSource
from rlhf.samples import TokenizedExample
from rlhf.tracking import Tracker, sample_rows

Evaluations = dict[str, dict[str, Any]]


@dataclass(slots=True)
class Parts:
    """Everything a pipeline drives.

    `rollouts(stage name, ...)` opens the source of an RL stage, `examples(stage name)` the endless stream of an SFT
    stage, `connect()` the weight transport once a model is loaded. `modes` are the reasoning modes to evaluate, the
    one that RL trains first.
    """

    learners: LearnerGroup
    publisher: Publisher
    evaluator: Evaluator
    rollouts: Callable[[str, Ledger, Algorithm], RolloutSource]
    examples: Callable[[str], Iterator[TokenizedExample]]
    connect: Callable[[], None]
    modes: tuple[bool, ...]
    turns: GpuTurns | None


@dataclass(slots=True)
class Pipeline:
    """Runs the stages and gathers what `summary.json` says."""

    config: RunConfig
    run_dir: Path
    base_model: Path
    parts: Parts
    tracker: Tracker
    console: RunConsole
    version: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)
    evaluations: Evaluations = field(default_factory=dict)
    rl: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """All stages. The policy of each is left in `checkpoints/<stage>`, that of the last in `policy`."""
        policy, names = self.base_model, list(self.config.stages)
        for number, (name, stage) in enumerate(self.config.stages.items()):
            algorithm = self._algorithm(stage)
            self.parts.learners.load(policy, stage.optimizer, self._optimiser_steps(stage), algorithm)
            if number == 0:
                self.parts.connect()
                self._publish()
                if self.config.evaluation.before:
                    self._evaluate("before")
            started = time.monotonic()
            if isinstance(stage, SftStage):
                steps, tokens = self._sft(name, stage, algorithm)
            else:
                steps, tokens = self._rl(name, stage, algorithm)
            seconds = time.monotonic() - started
            record = {"name": name, "seconds": seconds, "steps": steps, "trained_tokens": tokens}
            # `rl` of the summary is that of the last RL stage; with several, each stage's own figures are here.
            self.stages.append(record | ({"rl": self.rl} if isinstance(stage, RlStage) else {}))
            policy = self.run_dir / ("policy" if name == names[-1] else f"checkpoints/{name}")
            self.parts.learners.save_policy(policy)
            self._evaluate(name)

    def _algorithm(self, stage: SftStage | RlStage) -> Algorithm:
        if isinstance(stage, SftStage):
            return build("sft", {})
        return build(self.config.algorithm.name, self.config.algorithm.hyperparameters)

    def _optimiser_steps(self, stage: SftStage | RlStage) -> int:
        return stage.steps * (stage.updates_per_step if isinstance(stage, RlStage) else 1)

    def _publish(self) -> None:
        with Phases(self.parts.turns)("sync"):
            self.parts.publisher.publish(self.version + 1)
        self.version += 1

    def _sft(self, name: str, stage: SftStage, algorithm: Algorithm) -> tuple[int, int]:
        examples, phases, tokens = self.parts.examples(name), Phases(self.parts.turns), 0
        with self.console.stage(name, stage.steps) as progress:
            for step in range(stage.steps):
                phases.start_step()
                with phases("batch"):
                    batch = supervised_batch([next(examples) for _ in range(stage.batch_size)], algorithm.token_weights)
                with phases("update"):
                    report = self.parts.learners.update(batch)
                tokens += report.trained_tokens
                metrics = supervised_metrics(report, phases)
                self.tracker.log(metrics, stage=name, step=step)
                progress.advance(step + 1, metrics, phases.step)
        self._publish()
        return stage.steps, tokens

    def _rl(self, name: str, stage: RlStage, algorithm: Algorithm) -> tuple[int, int]:
        ledger = Ledger(self.run_dir)
        totals = RlTotals()
        controller = Controller(
            rollouts=self.parts.rollouts(name, ledger, algorithm),
            learners=self.parts.learners,
            publisher=self.parts.publisher,
            algorithm=algorithm,
            ledger=ledger,
            version=self.version,
            updates_per_step=stage.updates_per_step,
            observe=lambda record: None,
            dump=lambda batch: torch.save(batch, self.run_dir / "non_finite_batch.pt"),
            phase=Phases(self.parts.turns),
        )
        with self.console.stage(name, stage.steps) as progress:

            def observe(record: StepRecord) -> None:
                metrics = step_metrics(record, ledger, controller.phase)
                totals.add(record, metrics)
                self.tracker.log(metrics, stage=name, step=record.step)
                progress.advance(record.step + 1, metrics, controller.phase.step)
                self._log_samples(name, record)
                self._evaluate_during(name, stage, record.step + 1)

            controller.observe = observe
            controller.run(stage.steps)
        self.version = controller.version
        self.rl = totals.summary(stage.steps, controller.rollouts.sampled_tokens, ledger, controller.phase)
        ledger.shutdown()
        return stage.steps, totals.trained_tokens

    def _log_samples(self, name: str, record: StepRecord) -> None:
        tracking = self.config.tracking
        if not tracking.samples_every or record.step % tracking.samples_every:
            return
        advantages, rows = sample_advantages(record), []
        for group in record.groups:
            shown = [advantages.get(sample.sample_id, 0.0) for sample in group.group.samples]
            rows += sample_rows(group, shown, "trained", self.config.rewards.correct_at)
        self.tracker.log_samples(rows[: tracking.samples_per_table], stage=name, step=record.step)

    def _evaluate_during(self, name: str, stage: RlStage, done: int) -> None:
        if not stage.evaluate_every or done % stage.evaluate_every or done == stage.steps:
            return
        result = self._figures(self.config.evaluation.during_prompts, self.parts.modes[0])
        self.tracker.log({f"evaluation/{key}": value for key, value in result.items()}, stage=name, step=done - 1)

    def _evaluate(self, name: str) -> None:
        results = {mode: self._figures(self.config.evaluation.prompts, mode) for mode in self.parts.modes}
        main = self.parts.modes[0]
        entry: dict[str, Any] = dict(results[main])
        if len(results) > 1:
            entry["non_reasoning"] = results[not main]
        self.evaluations[name] = entry
        flat = {f"evaluation/{key}": value for key, value in results[main].items()}
        for mode in self.parts.modes[1:]:
            flat |= {f"evaluation/non_reasoning/{key}": value for key, value in results[mode].items()}
        step = self.stages[-1]["steps"] if self.stages else 0
        self.tracker.log(flat, stage=name, step=step)

    def _figures(self, prompts: int, reasoning_mode: bool) -> dict[str, float]:
        with Phases(self.parts.turns)("evaluate"):
            return self.parts.evaluator.evaluate(prompts, reasoning_mode=reasoning_mode).as_summary()

    def result_rows(self) -> dict[str, Mapping[str, float]]:
        """The evaluations as rows of the result table: one for each stage and mode."""
        rows: dict[str, Mapping[str, float]] = {}
        for mode in ("reasoning", "non_reasoning"):
            for name, entry in self.evaluations.items():
                if mode == "non_reasoning" and mode in entry:
                    rows[f"{name}/{mode}"] = entry[mode]
                elif mode == "reasoning":
                    rows[f"{name}/{mode}" if len(self.parts.modes) > 1 else name] = entry
        return rows


@dataclass(slots=True)
class RlTotals:
    """Sums over the steps of an RL stage, for the summary."""

    trained_tokens: int = 0
    kl_sum: float = 0.0
    masked_sum: float = 0.0
    sync_seconds: float = 0.0
    sync_bytes: int = 0
    steps: int = 0

    def add(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        tokens = int(record.batch.loss_mask.sum())
        self.trained_tokens += sum(update.trained_tokens for update in record.updates)
        self.kl_sum += metrics["mismatch/kl_nats"] * tokens
        self.masked_sum += metrics.get("mismatch/masked_fraction", 0.0) * tokens
        self.sync_seconds += record.sync.seconds
        self.sync_bytes = record.sync.size_bytes
        self.steps += 1

    def summary(self, steps: int, rollout_tokens: int, ledger: Ledger, phases: Phases) -> dict[str, Any]:
        seconds = sum(phases.total.values())
        tokens = max(1, self.trained_tokens)
        counts = ledger.counts()
        return {
            "steps": steps,
            "groups_dispatched": counts["dispatched"],
            "ledger": counts,
            "phase_seconds": dict(phases.total),
            "rollout_tokens": rollout_tokens,
            "trained_tokens": self.trained_tokens,
            "tokens_per_second": self.trained_tokens / max(seconds, 1e-9),
            "mismatch_kl_nats": self.kl_sum / tokens,
            "masked_fraction": self.masked_sum / tokens,
            "sync_seconds_mean": self.sync_seconds / max(1, self.steps),
            "sync_bytes": self.sync_bytes,
        }


def supervised_metrics(report: UpdateReport, phases: Phases) -> dict[str, float]:
    """The metrics of one SFT step; units are in the keys."""
    seconds = sum(phases.step.values())
    return {
        "policy/loss": report.loss,
        **report.metrics,
        "optim/grad_norm": report.grad_norm,
        "optim/learning_rate": report.learning_rate,
        **{f"time/{name}_s": value for name, value in phases.step.items()},
        "time/step_s": seconds,
        "perf/trained_tokens": report.trained_tokens,
        "perf/trained_tokens_per_s": report.trained_tokens / seconds,
    }
