"""Which run a command goes on with, and that it is still the same run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf import jsonl
from rlhf.checkpoints.journal import STEP_FILE, Digests, Journal, JournaledStep, keep_only
from rlhf.checkpoints.store import Checkpoint, CheckpointStore
from rlhf.config import RunConfig
from rlhf.errors import CheckpointError, ConfigError, ReplayError, did_you_mean

CHECKPOINTS = "checkpoints"
JOURNAL = "journal"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
AUTO = "auto"
OF_THE_COMMAND = frozenset({"resume", "dry_run"})
"""Keys that say what to do with a run and not what it is."""
_SHOWN = 20
_LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run goes on: after the last of the `journaled` steps that follow `checkpoint`."""

    checkpoint: Checkpoint
    journaled: tuple[JournaledStep, ...]

    @property
    def record_bytes(self) -> Mapping[str, int]:
        """Size in bytes of each of the run's records at this point."""
        return self.journaled[-1].record_bytes if self.journaled else self.checkpoint.state["record_bytes"]


def resume_point(store: CheckpointStore, journal: Path, report: Callable[[str], None]) -> ResumePoint | None:
    """The newest whole checkpoint with the journaled steps after it; None where the run has none.

    Steps in the directory `journal` that do not follow it are removed: the run makes them anew.
    """
    checkpoint = store.newest(report)
    if checkpoint is None:
        keep_only(journal, {})
        return None
    stage, step = checkpoint.state["stage"], checkpoint.state["step"]
    journaled = Journal(journal / stage).following(step)
    keep_only(journal, {stage: range(step + len(journaled))})
    return ResumePoint(checkpoint, journaled)


def check_replayed(
    step: JournaledStep, losses: Sequence[float], digests: Sequence[Digests], machines: Sequence[Mapping[str, Any]]
) -> bool:
    """True where a step that was trained again gave the recorded bits; False where only losses can be compared.

    That is so where `machines`, what the ranks run on now, are not those of the first time. Raises ReplayError that
    names the step and the first tensor, or the loss, that differs.
    """
    if [dict(one) for one in step.machines] != [dict(one) for one in machines]:
        for number, (loss_before, loss) in enumerate(zip(step.losses, losses, strict=True)):
            if abs(loss - loss_before) > _LOSS_TOLERANCE * max(1.0, abs(loss_before)):
                raise ReplayError(
                    f"step {step.step}, optimiser step {number}: has the loss {loss:.8g} when trained again on another "
                    f"machine or layout, and had {loss_before:.8g}; {_LOSS_TOLERANCE:g} is allowed. {_NO_REPLAY}"
                )
        return False
    for rank, (before, now) in enumerate(zip(step.digests, digests, strict=True)):
        for name, digest in before.items():
            if now.get(name) != digest:
                raise ReplayError(
                    f"step {step.step}, rank {rank}, tensor {name}: has other bits when trained again: "
                    f"{now.get(name, 'absent')} and not {digest}. {_NO_REPLAY}"
                )
    return True


_NO_REPLAY = (
    "The program or the memory of a machine has changed. Restore them, or remove the run's directory journal to sample "
    "these steps again."
)


def find_run(resume: str, run_root: Path, experiment: str) -> Path | None:
    """The directory of the run to go on with. None: `auto` found no unfinished run of `experiment`.

    Raises ConfigError where there is no such run, or it has finished.
    """
    if resume == AUTO:
        runs = sorted(run_root.glob(f"*-{experiment}-??????"), reverse=True)
        newest = next((run for run in runs if (run / CONFIG_FILE).is_file()), None)
        return None if newest is None or (newest / SUMMARY_FILE).exists() else newest
    given = Path(resume).expanduser()
    found = next((path for path in (given, run_root / resume) if (path / CONFIG_FILE).is_file()), None)
    if found is None:
        names = [path.parent.name for path in run_root.glob(f"*/{CONFIG_FILE}")]
        fix = did_you_mean(given.name, names, f"Runs are below {run_root.absolute()}.")
        raise ConfigError([f"resume = {resume}: must be the directory of a run. It has no {CONFIG_FILE}. {fix}"])
    if (found / SUMMARY_FILE).exists():
        fix = "Its policy is in the directory policy; start a new run from it with model.path."
        raise ConfigError([f"resume = {resume}: must be an unfinished run. It has a {SUMMARY_FILE}. {fix}"])
    return found.resolve()


def saved_position(run_dir: Path) -> str | None:
    """How far the run is saved, to be compared and shown: its newest checkpoint and its last journaled step."""
    checkpoints = sorted(path.name for path in (run_dir / CHECKPOINTS).glob("[0-9]*"))
    if not checkpoints:
        return None
    steps = sorted(path.parent.name for path in (run_dir / JOURNAL).glob(f"*/*/{STEP_FILE}"))
    return f"checkpoint {checkpoints[-1]}" + (f" and the journal up to step {int(steps[-1])}" if steps else "")


def saved_config(run_dir: Path) -> dict[str, Any]:
    """The configuration that the run was started with, as plain values."""
    return dict(yaml.safe_load((run_dir / CONFIG_FILE).read_text()))


def require_same(config: RunConfig, run_dir: Path) -> None:
    """Raises ConfigError with every key whose value is not the one the run was started with."""
    now, then = (_flat(values) for values in (config.model_dump(mode="json"), saved_config(run_dir)))
    keys = sorted(key for key in now.keys() | then.keys() if key.split(".")[0] not in OF_THE_COMMAND)
    changed = [
        f"{key} = {now.get(key, 'absent')}: must be {then.get(key, 'absent')}, as in the run that is resumed."
        for key in keys
        if now.get(key) != then.get(key)
    ]
    if changed:
        more = [f"... and {len(changed) - _SHOWN} more keys."] if len(changed) > _SHOWN else []
        fix = f"Say resume={run_dir.name} and nothing else to go on as it was, or start a new run."
        raise ConfigError([*changed[:_SHOWN], *more, fix])


def require_same_data(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises CheckpointError for the first stage whose data are others than when the run was saved."""
    for stage, fingerprint in now.items():
        if saved.get(stage) != fingerprint:
            raise CheckpointError(
                f"stages.{stage}: must have the data of the run that is resumed. Its records or their order have "
                "changed since. Restore the files, or start a new run."
            )


def cut_records(run_dir: Path, resumed: ResumePoint | None, names: tuple[str, ...]) -> None:
    """Take from the run's records what came after `resumed`, or all where there is none: it is done again."""
    sizes = {} if resumed is None else resumed.record_bytes
    for name in names:
        jsonl.cut(run_dir / name, sizes.get(name, 0))


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Nobody else writes to the run while the block runs. Raises ConfigError where somebody does."""
    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                [f"{run_dir}: must not be running. Process {holder} writes to it. End that one first."]
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return out
