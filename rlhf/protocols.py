"""What the controller and the stages ask of the parts they drive. Ray shells and plain classes both fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rlhf.batches import Batch, Rows, UpdateReport
from rlhf.config import AlgorithmConfig, OptimizerConfig
from rlhf.evaluation import EvaluationResult
from rlhf.samples import ScoredGroup, WeightVersion
from rlhf.selection import Arrivals


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight sync that was attested. Gaps are absolute log-prob differences on the probe, in nats."""

    version: WeightVersion
    size_bytes: int
    seconds: float
    probe_mean_gap_nats: float
    probe_max_gap_nats: float


class LearnerGroup(Protocol):
    """All learner ranks as one."""

    def load(self, model_path: Path, optimizer: OptimizerConfig, total_steps: int, algorithm: AlgorithmConfig) -> None:
        """Start a stage: the weights at `model_path` and a fresh optimiser."""
        ...

    def logprobs(self, batch: Rows) -> Tensor:
        """Log-probs [N, T] under the current weights, in the order of `batch`.

        At the rollout temperature in stages over rollouts, at 1 in the others.
        """
        ...

    def reference_logprobs(self, batch: Rows) -> Tensor:
        """The same under the weights at the start of the stage; only where its algorithm over rollouts needs them."""
        ...

    def update(self, batch: Batch) -> UpdateReport: ...

    def save_policy(self, directory: Path) -> None:
        """The policy in Hugging Face format, with its tokenizer; the same bits the learner holds."""
        ...


class Publisher(Protocol):
    """Brings the learner's weights to every engine; see `WeightPublisher`."""

    def publish(self, version: WeightVersion) -> SyncReport: ...


class RolloutSource(Protocol):
    """Where scored groups come from; see `StalenessBuffer`."""

    arrived: Arrivals
    """What came back during the last `take`."""

    sampled_tokens: int
    """Completion tokens of everything that came back so far, trained or not."""

    def take(self, version: WeightVersion) -> list[ScoredGroup]: ...


class Evaluator(Protocol):
    """Greedy and sampled completions of the fixed held-out prompts, scored."""

    def evaluate(self, prompts: int, *, reasoning_mode: bool) -> EvaluationResult: ...
