"""What every stage works with, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf.algorithms import Algorithm, build
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.checkpoints.saver import Checkpoints
from rlhf.config import CollectStage, FilterStage, PreferenceStage, RunConfig, TrainingStage
from rlhf.console import RunConsole
from rlhf.ledger import Ledger
from rlhf.phases import GpuTurns, Phases
from rlhf.preferences import Selected
from rlhf.protocols import Evaluator, LearnerGroup, Publisher, RolloutSource, StageSetup
from rlhf.samples import PreferenceUnit, ScoredGroup, TokenizedExample
from rlhf.tracking import Tracker


class StageData(Protocol):
    """The data of a run by the name of the stage that asks; `RunData` of `rollouts.run_data`."""

    def rollouts(
        self, name: str, ledger: Ledger, algorithm: OnlineAlgorithm, state: Mapping[str, Any] | None
    ) -> RolloutSource:
        """Opens the source of scored groups of an RL stage; with a `state` it goes on from there."""
        ...

    def examples(self, name: str) -> Iterator[TokenizedExample]:
        """The endless stream of demonstrations of an SFT stage."""
        ...

    def sampled(
        self, name: str, stage: FilterStage | CollectStage, progress: Callable[[int], None]
    ) -> Iterator[ScoredGroup]:
        """Scored completions of the stage's prompts under the current policy, in the order of the prompts."""
        ...

    def prompt_count(self, name: str, stage: FilterStage | CollectStage) -> int:
        """How many prompts `sampled` will ask."""
        ...

    def fingerprint(self, name: str) -> str:
        """Changes with anything that changes the prompts of the stage."""
        ...

    def keep(self, name: str, indices: Sequence[int]) -> None:
        """From now on stages over the same data as stage `name` take only the prompts at `indices`."""
        ...

    def write_preferences(self, path: Path, records: Sequence[Selected]) -> None: ...

    def read_preferences(self, path: Path) -> Sequence[Selected]: ...

    def preferences(self, name: str, stage: PreferenceStage, collected: Path | None) -> Sequence[PreferenceUnit]:
        """The pairs or groups of a preference stage: from `collected`, or from the file its config names."""
        ...


@dataclass(slots=True)
class Parts:
    """Everything a pipeline drives.

    `connect()` opens the weight transport once a model is loaded. `service_metrics()` are those of the reward service
    under `reward_service/`, of the run's servers under `server/` and of the engines under `engine/`. `modes` are the
    reasoning modes to evaluate, the one that RL trains first.
    """

    learners: LearnerGroup
    publisher: Publisher
    evaluator: Evaluator
    data: StageData
    connect: Callable[[], None]
    service_metrics: Callable[[], Mapping[str, float]]
    modes: tuple[bool, ...]
    turns: GpuTurns | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage did, for summary.json. `figures` are those of its kind, e.g. {"rl": {...}}."""

    steps: int
    trained_tokens: int
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Context:
    """One run as its stages see it. `policy` is where the weights are that the current stage started from.

    Of each collect stage so far `collected` has the Parquet file, `records` what it picked itself; `kept` are the
    prompts that filter stages left, by the name of the stage.
    """

    config: RunConfig
    run_dir: Path
    policy: Path
    parts: Parts
    tracker: Tracker
    console: RunConsole
    checkpoints: Checkpoints
    collected: dict[str, Path] = field(default_factory=dict)
    records: dict[str, list[Selected]] = field(default_factory=dict)
    kept: list[tuple[str, Sequence[int]]] = field(default_factory=list)

    def algorithm(self, stage: TrainingStage) -> Algorithm:
        chosen = self.config.algorithm_of(stage)
        return build(chosen.name, chosen.hyperparameters, chosen.modules)

    def begin_stage(self, stage: TrainingStage, steps: int, first_step: int = 0) -> None:
        """Give the learners the algorithm of `stage` and its optimiser, fresh unless some of its steps are done."""
        algorithm = self.config.algorithm_of(stage)
        self.parts.learners.begin_stage(StageSetup(self.policy, stage.optimizer, steps, algorithm, first_step))

    def keep(self, name: str, indices: Sequence[int]) -> None:
        """From now on stages over the same data as stage `name` take only the prompts at `indices`."""
        self.kept.append((name, indices))
        self.parts.data.keep(name, indices)

    def publish(self) -> None:
        """The engines hold the learners' weights."""
        with self.phases()("sync"):
            self.parts.publisher.publish()

    def phases(self, spent: Mapping[str, float] | None = None) -> Phases:
        return Phases(self.parts.turns, spent)

    def evaluate(self, prompts: int, reasoning_mode: bool) -> dict[str, Any]:
        """Figures over held-out prompts."""
        with self.phases()("evaluate"):
            return self.parts.evaluator.evaluate(prompts, reasoning_mode=reasoning_mode).as_summary()
