"""Time of RL steps with journal, digests and a checkpoint every ten steps over that of steps without."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.isolated import isolated
from benchmarks.rollouts.overlap import Stack, config
from rlhf.checkpoints.journal import Journal, JournaledStep
from rlhf.checkpoints.store import CheckpointStore
from rlhf.controller import StepRecord
from rlhf.training.worker import RayLearnerGroup

BLOCK = 10
PAIRS_OF_BLOCKS = {"tiny": 20, "135m": 3}


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """Alternating blocks of ten steps, one with journal, digests and a checkpoint at its end, one without."""
    wanted = {"tiny": 8} if quick else PAIRS_OF_BLOCKS
    names, rows = list(wanted), {name: isolated(measure_cost, name, pairs) for name, pairs in wanted.items()}
    figures = {}
    for name, row in rows.items():
        suffix = "" if name == names[-1] else f"_{name}"
        figures[f"checkpoint_overhead{suffix}"] = row["ratio"]
        figures[f"journal_overhead{suffix}"] = row["ratio_without_checkpoint"]
    return {"rows": rows, "figures": figures}


class Switched:
    """Learners whose digests can be left out."""

    def __init__(self, learners: RayLearnerGroup) -> None:
        self._learners = learners
        self.on = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learners, name)

    def master_digests(self) -> list[dict[str, str]]:
        return self._learners.master_digests() if self.on else []


def measure_cost(name: str, pairs: int) -> dict[str, Any]:
    """Medians over pairs of blocks, in their order; runs in its own process."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    saving = []
    with Stack(config(name, 1)) as stack, tempfile.TemporaryDirectory() as folder:
        journal, store = Journal(Path(folder) / "journal"), CheckpointStore(Path(folder) / "checkpoints", keep=2)
        learners = Switched(stack.learners)

        def directory(step: int) -> Path | None:
            return journal.directory(step) if learners.on else None

        steps = stack.steps(1, 2 * BLOCK * pairs + BLOCK, learners, directory)
        for step, record in enumerate(steps):
            if step < BLOCK:  # warms up
                started = time.monotonic()
                continue
            if learners.on:
                journal.write(journaled(record))
            if (step + 1) % BLOCK:
                continue
            if learners.on:
                before = time.monotonic()
                store.write("rl", {}, 0, lambda folder: learners.save_state(folder / "learner"))
                journal.keep(range(step + 1, step + 2))
                saving.append(time.monotonic() - before)
            now = time.monotonic()
            seconds[learners.on].append(now - started)
            started = now
            learners.on = not learners.on
    ratios = [with_it / without for without, with_it in zip(seconds[False], seconds[True], strict=False)]
    bare = [
        (with_it - saved) / without
        for without, with_it, saved in zip(seconds[False], seconds[True], saving, strict=False)
    ]
    return {
        "ratio": statistics.median(ratios),
        "ratio_without_checkpoint": statistics.median(bare),
        "seconds_with": seconds[True],
        "seconds_without": seconds[False],
        "checkpoint_seconds": saving,
    }


def journaled(record: StepRecord) -> JournaledStep:
    """As the RL stage writes it, with a state of about its size."""
    state = {"rollouts": list(range(64)), "ledger": {"in_flight": {f"rl-{i:06d}": 1 for i in range(64)}}}
    losses, norms = [u.loss for u in record.updates], [u.grad_norm for u in record.updates]
    return JournaledStep(record.step, record.sync.version, losses, norms, record.digests, [], state, {})
