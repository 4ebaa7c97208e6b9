"""The loop of online RL.

    prompts -> rollouts -> rewards -> selection    (the rollout source: TrainingRollouts, in a loop of its own)
            -> RolloutBatch -> HeldStep -> UpdateReport -> next weight version

Synchronous training is `max_staleness: 0`; there is no second loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.batches.ragged import RolloutBatch, rollout_batch
from rlhf.ledger import Ledger
from rlhf.metrics import merged
from rlhf.mismatch import without_redundant_fresh
from rlhf.phases import Phases
from rlhf.protocols import HeldStep, LearnerGroup, Publisher, RolloutSource, SyncReport, Taken, UpdateReport
from rlhf.samples import ScoredGroup


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one RL step did, for logs, tables and the summary.

    `advantages` [N] are in the order of the valued samples, `digests` those of each rank's masters after the updates.
    """

    step: int
    taken: Taken
    batch: RolloutBatch
    advantages: Tensor
    updates: Sequence[UpdateReport]
    sync: SyncReport
    digests: Sequence[Mapping[str, str]]

    @property
    def groups(self) -> Sequence[ScoredGroup]:
        return self.taken.groups


@dataclass(slots=True)
class Controller:
    """Drives rollouts, learners and weight sync from one weight version to the next.

    `journal` gives the directory in which the learners note what a step trains.
    """

    rollouts: RolloutSource
    learners: LearnerGroup
    publisher: Publisher
    algorithm: OnlineAlgorithm
    correct_at: float
    max_staleness: int
    updates_per_step: int
    journal: Callable[[int], Path | None]
    phase: Phases = field(default_factory=Phases)

    def steps(self, count: int, first: int = 0) -> Iterator[StepRecord]:
        """Make the steps from `first` to `count`, one each time the next record is asked for."""
        for number in range(first, count):
            self.phase.start_step()
            yield self.step(number)

    def step(self, step: int) -> StepRecord:
        """One step: groups in, a new attested weight version out, every group of it closed in the ledger."""
        version = self.publisher.version
        with self.phase("rollout"):
            taken = self.rollouts.take(version)
            groups = taken.groups
        with self.phase("annotate"):
            batch = rollout_batch(groups, version, self.correct_at, self.max_staleness)
            parts = optimiser_steps(batch, self.updates_per_step)
            held = self.learners.hold(batch, parts, self.journal(step))
        with self.phase("advantage"):
            advantages = self.algorithm.advantages(batch.samples, held.kl_nats)
        with self.phase("update"):
            updates = [self._update(held, number, batch, part, advantages) for number, part in enumerate(parts)]
            digests = self.learners.master_digests()
        with self.phase("sync"):
            sync = self.publisher.publish()
        # Sampling for the next step begins before this one is looked at.
        self.rollouts.trained(groups, step)
        self.rollouts.advance(self.publisher.version)
        return StepRecord(step, taken, batch, advantages, updates, sync, digests)

    def _update(
        self, held: HeldStep, number: int, batch: RolloutBatch, part: np.ndarray, advantages: Tensor
    ) -> UpdateReport:
        weights = torch.zeros(len(batch.samples))
        weights[part] = self.algorithm.sample_weights(batch.samples.completion_tokens[part])
        return held.update(number, advantages, weights)


def optimiser_steps(batch: RolloutBatch, updates: int) -> list[np.ndarray]:
    """The numbers of the samples of each optimiser step: whole groups, `updates` parts or fewer."""
    index = batch.samples.group_index
    parts = torch.unique(index).tensor_split(updates)
    return [torch.nonzero(torch.isin(index, groups)).squeeze(-1).numpy() for groups in parts if len(groups)]


def step_metrics(record: StepRecord, ledger: Ledger, phases: Phases) -> dict[str, float]:
    """The metrics of one step under the names of the documentation; units are in the keys."""
    samples, updates = record.batch.samples, record.updates
    trained = sum(update.trained_tokens for update in updates)
    counts = ledger.counts()
    seconds = sum(phases.step.values())
    return {
        **record.taken.arrived.metrics(),
        **record.taken.metrics,
        "trained/groups": len(record.groups),
        "trained/reward_mean": float(samples.rewards.mean()),
        "trained/completion_tokens": float(samples.completion_tokens.float().mean()),
        "advantage/abs_mean": float(record.advantages.abs().mean()),
        "rollout/generate_s": _mean([group.group.generate_s for group in record.groups]),
        "rollout/score_s": _mean([group.score_s for group in record.groups]),
        "staleness/mean_steps": float(samples.staleness.float().mean()),
        "staleness/max_steps": float(samples.staleness.max()),
        **without_redundant_fresh(merged(update.metrics for update in updates).result(), samples.staleness),
        "policy/loss": _mean([update.loss for update in updates]),
        "optim/grad_norm": _mean([update.grad_norm for update in updates]),
        "optim/learning_rate": updates[-1].learning_rate,
        "sync/s": record.sync.seconds,
        "sync/pause_s": record.sync.pause_s,
        "sync/bytes": record.sync.size_bytes,
        "sync/probe_max_gap_nats": record.sync.probe_max_gap_nats,
        **{f"time/{name}_s": value for name, value in phases.step.items()},
        "time/step_s": seconds,
        "perf/trained_tokens": trained,
        "perf/trained_tokens_per_s": trained / seconds,
        **{f"ledger/{state}": count for state, count in counts.items()},
    }


def sample_advantages(record: StepRecord) -> dict[str, float]:
    """Advantage by sample id."""
    samples = [sample for group in record.groups for sample, _ in group.valued]
    return {sample.sample_id: float(a) for sample, a in zip(samples, record.advantages, strict=True)}


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
