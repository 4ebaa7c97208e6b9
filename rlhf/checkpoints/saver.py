"""When a run is saved and what of it, and where a resumed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf.checkpoints.journal import Journal, JournaledStep, keep_only
from rlhf.checkpoints.resume import ResumePoint
from rlhf.checkpoints.store import CheckpointStore
from rlhf.config import CheckpointsConfig
from rlhf.errors import StorageError
from rlhf.runtime.interrupts import Interrupts

LEARNER = "learner"
"""The directory of the learner ranks' state in a checkpoint."""


class SavesState(Protocol):
    """The learners."""

    def save_state(self, directory: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Where a stage goes on: after `step` of its steps, with the `state` that it saved then.

    The steps `journaled` were done after that: to be trained again, and not sampled.
    """

    step: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)
    journaled: tuple[JournaledStep, ...] = ()


class Checkpoints:
    """Saves a run between two steps when it is due, and at the end of each stage.

    A disk that is full does not stop the run: `report` is
    told, and the next checkpoint is tried when it is due.
    """

    def __init__(
        self,
        store: CheckpointStore,
        journal: Path,
        config: CheckpointsConfig,
        interrupts: Interrupts,
        report: Callable[[str], None],
        resumed: ResumePoint | None = None,
    ) -> None:
        """`resumed` is where the run goes on, `journal` the directory of the journals of its stages."""
        self._store = store
        self._journal = journal
        self._config = config
        self.interrupts = interrupts
        self._report = report
        self.resumed = resumed

    def begin(self, learners: SavesState, of_run: Callable[[], dict[str, Any]], size_bytes: int) -> None:
        """From now on the state of `learners` is saved, and what `of_run` gives of the run beside the stage.

        `size_bytes` is about what a checkpoint takes; none is begun with less space than that.
        """
        self._learners = learners
        self._of_run = of_run
        self._size_bytes = size_bytes
        self._last = time.monotonic()

    def take_resumed(self, stage: str) -> StageProgress:
        """Where `stage` goes on: at its beginning unless the run was resumed in it."""
        resumed = self.resumed
        if resumed is None or resumed.checkpoint.state["stage"] != stage:
            return StageProgress()
        self.resumed = None
        saved = resumed.checkpoint.state
        return StageProgress(saved["step"], saved["of_stage"], resumed.journaled)

    def journal(self, stage: str) -> Journal:
        """The journal of `stage`."""
        return Journal(self._journal / stage)

    def step_done(self, stage: str, done: int, steps: int, of_stage: Callable[[], Mapping[str, Any]]) -> None:
        """`done` of the `steps` of `stage` are done. The last one is saved with the end of the stage.

        Raises KeyboardInterrupt, with the step saved, if the run was asked to end.
        """
        every, asked = self._config.every_steps, self.interrupts.requested
        due = time.monotonic() - self._last >= self._config.every_s or (every > 0 and done % every == 0)
        if asked or (due and done < steps):
            self.save(stage, done, of_stage())
        if asked:
            raise KeyboardInterrupt

    def steps(self) -> AbstractContextManager[None]:
        """In the block every step ends with `step_done`: a signal waits for it."""
        return self.interrupts.deferred(self._config.grace_s)

    def save(self, stage: str, step: int, of_stage: Mapping[str, Any]) -> None:
        """Save the run as it is before step `step` of `stage`."""
        state = {**self._of_run(), "stage": stage, "step": step, "of_stage": of_stage}
        state["record_bytes"] = self.record_bytes(of_stage)
        try:
            self._store.write(
                f"{stage}-{step:06d}",
                state,
                self._size_bytes,
                lambda folder: self._learners.save_state(folder / LEARNER),
            )
            with suppress(OSError):  # what cannot be removed now goes with the next checkpoint
                keep_only(self._journal, self._store.journaled_steps())
        except StorageError as error:
            self._report(f"no checkpoint after step {step} of {stage}: {error}")
        self._last = time.monotonic()

    def record_bytes(self, of_stage: Mapping[str, Any]) -> dict[str, int]:
        """The sizes of the run's records. One that is written to in the background is as long as `of_stage` says."""
        return {**self._of_run()["record_bytes"], **of_stage.get("record_bytes", {})}
