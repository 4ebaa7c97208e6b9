"""Train one step of a run again, from its checkpoint and its journal, and compare it with the first time.

    python -m rlhf.replay RUN --step 12
    python -m rlhf.replay RUN --step 12 --algorithm grpo
    python -m rlhf.replay RUN --step 12 --algorithm grpo --set clip_high=0.3

Only learners are started, as many as the run had. The steps between the checkpoint and the asked one are trained as
they were; with `--algorithm` the asked one has another loss, on the same rows, advantages and weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rlhf import jsonl
from rlhf.checkpoints.journal import Journal
from rlhf.checkpoints.resume import CHECKPOINTS, CONFIG_FILE, JOURNAL, locked, saved_config
from rlhf.checkpoints.saver import LEARNER
from rlhf.checkpoints.store import Checkpoint, CheckpointStore
from rlhf.cluster import Cluster
from rlhf.config import AlgorithmConfig, RlStage, RunConfig
from rlhf.errors import ConfigError, GroupwiseError
from rlhf.metrics import merged
from rlhf.protocols import StageSetup, UpdateReport
from rlhf.tracking import METRICS_FILE
from rlhf.training.worker import RayLearnerGroup


@dataclass(frozen=True, slots=True)
class Replay:
    """One step of an RL stage to train again, and the checkpoint to begin from."""

    run_dir: Path
    config: RunConfig
    stage: str
    step: int
    checkpoint: Checkpoint

    @staticmethod
    def of(run_dir: Path, step: int, stage: str | None) -> Replay:
        """Raises ConfigError where the run has no such step any more, with those that it has."""
        config = RunConfig.model_validate(saved_config(run_dir))
        names = [name for name, one in config.stages.items() if isinstance(one, RlStage)]
        kept = {name: _steps(run_dir / JOURNAL / name) for name in names}
        chosen = stage or next((name for name in reversed(names) if kept[name]), "")
        if step not in kept.get(chosen, ()):
            has = [f"{name}: {min(steps)} to {max(steps)}" for name, steps in kept.items() if steps]
            raise ConfigError(
                [
                    f"--step {step}: must be a step of an RL stage that the journal of {run_dir.name} has. It has "
                    f"{', '.join(has) or 'none'}. Steps before the oldest checkpoint are dropped; checkpoints.keep "
                    "says how many checkpoints stay."
                ]
            )
        found = [one for one in _checkpoints(run_dir) if one.state["stage"] == chosen and one.state["step"] <= step]
        if not found:
            raise ConfigError(
                [f"--step {step}: must follow a checkpoint of stage {chosen}. {run_dir / CHECKPOINTS} has none."]
            )
        return Replay(run_dir, config, chosen, step, found[-1])

    def trained(self, changed: AlgorithmConfig | None) -> list[UpdateReport]:
        """Train up to the step and the step itself; the reports of its updates."""
        stage, state = self.config.stages[self.stage], self.checkpoint.state
        assert isinstance(stage, RlStage)
        journal, first = Journal(self.run_dir / JOURNAL / self.stage), state["of_stage"].get("optimiser_steps", 0)
        policy, algorithm = self.run_dir / state["policy"], self.config.algorithm_of(stage)
        total = stage.steps * stage.updates_per_step
        with _learners(self.config) as learners:
            learners.load_model(policy)
            learners.load_state(self.checkpoint.path / LEARNER)
            learners.begin_stage(StageSetup(policy, stage.optimizer, total, algorithm, first))
            for step in range(state["step"], self.step):
                first += len(learners.replay(journal.directory(step)))
            if changed is not None:
                learners.begin_stage(StageSetup(policy, stage.optimizer, total, changed, first))
            return learners.replay(journal.directory(self.step))

    def recorded(self) -> dict[str, float]:
        """The metrics of the step as they were logged; empty for a step that was not finished."""
        for line in jsonl.read(self.run_dir / METRICS_FILE):
            if line["stage"] == self.stage and line["step"] == self.step and "policy/loss" in line:
                return line
        return {}


def metrics_of(updates: Sequence[UpdateReport]) -> dict[str, float]:
    """The metrics that come from the updates of a step, under the names of the run."""
    return {
        "policy/loss": sum(update.loss for update in updates) / len(updates),
        "optim/grad_norm": sum(update.grad_norm for update in updates) / len(updates),
        "optim/learning_rate": updates[-1].learning_rate,
        **merged(update.metrics for update in updates).result(),
    }


def table(recorded: Mapping[str, float], found: Mapping[str, float], title: str) -> Table:
    """Both values of every metric, and the difference."""
    out = Table("metric", "recorded", "replayed", "difference", title=title)
    for name, value in found.items():
        if name not in recorded:
            out.add_row(name, "-", f"{value:.8g}", "-")
        else:
            out.add_row(name, f"{recorded[name]:.8g}", f"{value:.8g}", f"{value - recorded[name]:.3g}")
    return out


@contextmanager
def _learners(config: RunConfig) -> Iterator[RayLearnerGroup]:
    with tempfile.TemporaryDirectory(prefix="groupwise-replay-") as folder:
        logs = Path(folder)
        with Cluster(config, logs, learners_only=True) as cluster:
            learners = RayLearnerGroup(cluster, config, logs / "logs")
            learners.join()
            yield learners


def _steps(journal: Path) -> list[int]:
    """The steps that have rows, the one that did not finish included."""
    return sorted(int(path.name) for path in journal.glob("[0-9]*"))


def _checkpoints(run_dir: Path) -> Iterator[Checkpoint]:
    for checkpoint in CheckpointStore(run_dir / CHECKPOINTS, keep=sys.maxsize).all():
        checkpoint.check_contents()
        yield checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after an error message."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of the run")
    parser.add_argument("--step", type=int, required=True, help="the step, as metrics.jsonl counts it")
    parser.add_argument("--stage", help="the RL stage; the last one with a journal without it")
    parser.add_argument("--algorithm", help="another algorithm for the step")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="its hyper-parameters")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        run_dir = _run_dir(options.run)
        with locked(run_dir):
            replay = Replay.of(run_dir, options.step, options.stage)
            changed = _algorithm(options.algorithm, options.set)
            found = metrics_of(replay.trained(changed))
    except GroupwiseError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    title = f"{replay.stage}, step {replay.step}" + (f", with {options.algorithm}" if changed else "")
    console.print(table(replay.recorded(), found, title))
    return 0


def _run_dir(path: Path) -> Path:
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError([f"{path}: must be the directory of a run. It has no {CONFIG_FILE}."])
    return path.resolve()


def _algorithm(name: str | None, assignments: Sequence[str]) -> AlgorithmConfig | None:
    if name is None:
        if assignments:
            raise ConfigError(["--set: must come with --algorithm. It sets that algorithm's hyper-parameters."])
        return None
    values = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError([f"--set {assignment}: must be KEY=VALUE."])
        values[key] = yaml.safe_load(value)
    return AlgorithmConfig(name=name, **values)


if __name__ == "__main__":
    sys.exit(main())
