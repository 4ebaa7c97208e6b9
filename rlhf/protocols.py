"""What the controller and the stages ask of the parts they drive. Ray shells and plain classes both fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rlhf.batches.ragged import OptimiserStep, RolloutBatch, Sequences
from rlhf.config import AlgorithmConfig, OptimizerConfig
from rlhf.evaluation import EvaluationResult
from rlhf.metrics import MetricSums
from rlhf.samples import ScoredGroup, WeightVersion
from rlhf.selection import Arrivals


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight sync that was attested. Gaps are absolute log-prob differences on the probe, in nats.

    Of its `seconds`, generation stood still for `pause_s`.
    """

    version: WeightVersion
    size_bytes: int
    seconds: float
    pause_s: float
    probe_mean_gap_nats: float
    probe_max_gap_nats: float


@dataclass(frozen=True, slots=True)
class StageSetup:
    """Settings of a training stage for the learners.

    `policy` holds the weights that the stage started from. `first_step`: so many optimiser steps of it are done.
    """

    policy: Path
    optimizer: OptimizerConfig
    total_steps: int
    algorithm: AlgorithmConfig
    first_step: int = 0


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Report of one optimiser step. `loss` and `grad_norm` (before clipping) are of the global batch.

    `metrics` are sums, so that the means over several updates count every token once.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    trained_tokens: int
    metrics: MetricSums


class HeldStep(Protocol):
    """A rollout step whose sequences the learners hold, annotated, until the next one."""

    kl_nats: Tensor
    """KL to the reference of each sample, float32 [N]; zeros unless the algorithm puts it into the reward."""

    def update(self, number: int, advantages: Tensor, weights: Tensor) -> UpdateReport:
        """Optimiser step `number`. `advantages`, `weights` float32 [N] are of all samples of the rollout step."""
        ...


class LearnerGroup(Protocol):
    """All learner ranks as one."""

    def load_model(self, model_path: Path) -> None:
        """Load the policy at `model_path`; once, before anything else."""
        ...

    def save_state(self, directory: Path) -> None:
        """Every rank writes its share of weights and optimiser into `directory`."""
        ...

    def load_state(self, directory: Path) -> None:
        """Every rank takes its share up again. Before `begin_stage`, with as many ranks and the same ZeRO stage."""
        ...

    def begin_stage(self, setup: StageSetup) -> None:
        """Start a training stage, or go on with it: the weights as they are, the stage's algorithm and optimiser."""
        ...

    def hold(self, batch: RolloutBatch, parts: Sequence[np.ndarray], journal: Path | None = None) -> HeldStep:
        """Tell the ranks which sequences to fetch, annotate and keep.

        `parts` are the numbers int64 [n] of the samples of each optimiser step. Each rank writes its rows into the
        directory `journal`, if one is given, before it trains them.
        """
        ...

    def replay(self, journal: Path) -> Sequence[UpdateReport]:
        """Train the step in the directory `journal` again, one report for each optimiser step."""
        ...

    def master_digests(self) -> Sequence[Mapping[str, str]]:
        """For each rank the digest of its part of every float32 master, by the name of the tensor."""
        ...

    def machines(self) -> Sequence[Mapping[str, Any]]:
        """For each rank what decides the bits of its arithmetic; see `rlhf.training.machine`."""
        ...

    def logprobs(self, batch: Sequences) -> np.ndarray:
        """Log-probs float32 [S] at temperature 1 under the current weights; zero off the loss mask."""
        ...

    def update(self, batch: OptimiserStep) -> UpdateReport:
        """One optimiser step on stored completions."""
        ...

    def save_policy(self, directory: Path) -> None:
        """The policy in Hugging Face format, with its tokenizer; the same bits the learner holds."""
        ...


class Publisher(Protocol):
    """Brings the learner's weights to every engine; see `WeightPublisher`."""

    version: WeightVersion

    def publish(self) -> SyncReport: ...


@dataclass(frozen=True, slots=True)
class Taken:
    """The groups of one step, what came back scored since the step before, and how dispatch went meanwhile."""

    groups: list[ScoredGroup]
    arrived: Arrivals
    metrics: dict[str, float]


class RolloutSource(Protocol):
    """Where scored groups come from; see `TrainingRollouts`."""

    sampled_tokens: int
    """Completion tokens of everything that came back so far, trained or not."""

    def advance(self, version: WeightVersion) -> None:
        """The engines hold `version`: sampling from it may begin."""
        ...

    def take(self, version: WeightVersion) -> Taken:
        """The groups of the step at `version`."""
        ...

    def trained(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """A step has trained its groups."""
        ...

    def state(self) -> dict[str, Any]:
        """Between two steps: what a source needs that goes on from here in another process. JSON."""
        ...

    def close(self) -> None:
        """Nothing more is taken; returns when no engine works for this source any more."""
        ...


class Evaluator(Protocol):
    """Greedy and sampled completions of the fixed held-out prompts, scored."""

    def evaluate(self, prompts: int, *, reasoning_mode: bool) -> EvaluationResult: ...
