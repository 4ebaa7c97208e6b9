"""Online reinforcement learning: the controller, watched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.checkpoints.journal import JournaledStep
from rlhf.checkpoints.resume import check_replayed
from rlhf.checkpoints.saver import StageProgress
from rlhf.config import RewardsConfig, RlStage
from rlhf.controller import Controller, StepRecord, sample_advantages, step_metrics
from rlhf.ledger import FILE_NAME as LEDGER_FILE
from rlhf.ledger import Ledger
from rlhf.phases import Phases
from rlhf.stages.context import Context, Outcome
from rlhf.tracking import sample_rows


def run(context: Context, name: str, stage: RlStage) -> Outcome:
    """Trains `stage.steps` steps; every one ends with a published weight version."""
    algorithm = context.algorithm(stage)
    assert isinstance(algorithm, OnlineAlgorithm)
    resumed = context.checkpoints.take_resumed(name)
    context.begin_stage(stage, stage.steps * stage.updates_per_step, resumed.state.get("optimiser_steps", 0))
    machines = context.parts.learners.machines()
    resumed = _replayed(context, name, resumed, machines)
    saved, journal = resumed.state, context.checkpoints.journal(name)
    ledger, totals = Ledger(context.run_dir, saved.get("ledger")), RlTotals(**saved.get("totals", {}))
    controller = Controller(
        rollouts=context.parts.data.rollouts(name, ledger, algorithm, saved.get("rollouts")),
        learners=context.parts.learners,
        publisher=context.parts.publisher,
        algorithm=algorithm,
        correct_at=context.config.rewards.correct_at,
        max_staleness=context.config.rollouts.max_staleness,
        updates_per_step=stage.updates_per_step,
        journal=journal.directory,
        phase=context.phases(saved.get("phase_seconds")),
    )

    def state() -> dict[str, Any]:
        rollouts = controller.rollouts.state()
        ledger_state = rollouts.pop("ledger")
        return {
            "rollouts": rollouts,
            "ledger": ledger_state,
            "record_bytes": {LEDGER_FILE: ledger_state["bytes"]},
            "totals": asdict(totals),
            "phase_seconds": dict(controller.phase.total),
            "optimiser_steps": totals.optimiser_steps,
        }

    with context.console.stage(name, stage.steps) as progress, context.checkpoints.steps():
        for record in controller.steps(stage.steps, resumed.step):
            metrics = {**step_metrics(record, ledger, controller.phase), **context.parts.service_metrics()}
            metrics |= scheduled_weights(context.config.rewards, record)
            totals.add(record, metrics)
            context.tracker.log(metrics, stage=name, step=record.step)
            progress.advance(record.step + 1, metrics, controller.phase.step)
            _log_samples(context, name, record)
            _evaluate_during(context, name, stage, record.step + 1)
            after = state()
            journal.write(_journaled(context, record, machines, after))
            context.checkpoints.step_done(name, record.step + 1, stage.steps, partial(dict, after))
    controller.rollouts.close()
    figures = totals.summary(stage.steps, controller.rollouts.sampled_tokens, ledger, controller.phase)
    ledger.shutdown()
    return Outcome(stage.steps, totals.trained_tokens, {"rl": figures})


def _replayed(
    context: Context, name: str, resumed: StageProgress, machines: Sequence[Mapping[str, Any]]
) -> StageProgress:
    """Where the stage goes on once its journaled steps are trained again, and proven to be what they were."""
    if not resumed.journaled:
        return resumed
    learners, journal = context.parts.learners, context.checkpoints.journal(name)
    exact = True
    with context.phases()("update"):
        for step in resumed.journaled:
            reports = learners.replay(journal.directory(step.step))
            losses = [report.loss for report in reports]
            exact &= check_replayed(step, losses, learners.master_digests(), machines)
    last = resumed.journaled[-1]
    context.parts.publisher.version = last.version - 1
    context.publish()
    proof = (
        "every tensor has the recorded bits" if exact else "losses agree; not exact, the machine or layout is another"
    )
    context.console.note(f"{name}: steps {resumed.step} to {last.step} were trained again from the journal; {proof}")
    return StageProgress(last.step + 1, last.state)


def _journaled(
    context: Context, record: StepRecord, machines: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> JournaledStep:
    return JournaledStep(
        step=record.step,
        version=record.sync.version,
        losses=[update.loss for update in record.updates],
        grad_norms=[update.grad_norm for update in record.updates],
        digests=record.digests,
        machines=machines,
        state=state,
        record_bytes=context.checkpoints.record_bytes(state),
    )


def scheduled_weights(rewards: RewardsConfig, record: StepRecord) -> dict[str, float]:
    """What each component with a schedule weighed in the newest samples of the step."""
    newest = max(group.group.first_version for group in record.groups)
    parts = rewards.components.items()
    return {f"reward/weight/{name}": part.weight_at(newest) for name, part in parts if part.weight_schedule}


def _log_samples(context: Context, name: str, record: StepRecord) -> None:
    tracking = context.config.tracking
    if not tracking.samples_every or record.step % tracking.samples_every:
        return
    advantages, correct_at = sample_advantages(record), context.config.rewards.correct_at
    rows = (
        row
        for group in record.groups
        for row in sample_rows(
            group, [advantages.get(s.sample_id, 0.0) for s in group.group.samples], "trained", correct_at
        )
    )
    # The text of a group is fetched when its rows are drawn: of no more groups than the table shows.
    shown = list(itertools.islice(rows, tracking.samples_per_table))
    context.tracker.log_samples(shown, stage=name, step=record.step)


def _evaluate_during(context: Context, name: str, stage: RlStage, done: int) -> None:
    if not stage.evaluate_every or done % stage.evaluate_every or done == stage.steps:
        return
    result = context.evaluate(context.config.evaluation.during_prompts, context.parts.modes[0])
    context.tracker.log({f"evaluation/{key}": value for key, value in result.items()}, stage=name, step=done - 1)


@dataclass(slots=True)
class RlTotals:
    """Sums over the steps of an RL stage, for the summary."""

    trained_tokens: int = 0
    kl_sum: float = 0.0
    masked_sum: float = 0.0
    sync_seconds: float = 0.0
    sync_bytes: int = 0
    steps: int = 0
    optimiser_steps: int = 0

    def add(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        tokens = int(record.batch.samples.completion_tokens.sum())
        self.trained_tokens += sum(update.trained_tokens for update in record.updates)
        self.kl_sum += metrics["mismatch/kl_nats"] * tokens
        self.masked_sum += metrics.get("mismatch/masked_fraction", 0.0) * tokens
        self.sync_seconds += record.sync.seconds
        self.sync_bytes = record.sync.size_bytes
        self.steps += 1
        self.optimiser_steps += len(record.updates)

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
