"""What a step trained can be read back to the bit, and only a step that is whole counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf.batches.packing import Share
from rlhf.batches.ragged import RolloutSequences
from rlhf.checkpoints.journal import (
    Journal,
    JournaledStep,
    RankJournal,
    RankUpdate,
    keep_only,
    read_rows,
    rows_path,
)
from rlhf.checkpoints.resume import resume_point
from rlhf.checkpoints.store import CheckpointStore
from rlhf.errors import CheckpointError

RANKS = 2


def share(seed: int, lengths: tuple[int, ...]) -> Share[RolloutSequences]:
    random, total = np.random.default_rng(seed), sum(lengths)
    batch = RolloutSequences(
        token_ids=random.integers(0, 1000, total).astype(np.int32),
        loss_mask=random.random(total) > 0.5,
        offsets=np.cumsum([0, *lengths]),
        rollout_logprobs=random.normal(size=total).astype(np.float32),
        sample_index=np.arange(len(lengths)),
        staleness=random.integers(0, 3, len(lengths)),
    )
    return Share(batch, (len(lengths), 0))


def update(number: int) -> RankUpdate:
    return RankUpdate(number, np.array([0.1, -np.inf], np.float32), np.array([1e-30, 2.0], np.float32))


def write(journal: Journal, step: int) -> None:
    """As a run of one step does it."""
    for rank in range(RANKS):
        rows = RankJournal(rows_path(journal.directory(step), rank), [share(rank, (3, 4))])
        rows.add(update(0))
        rows.close()
    journal.write(done(step))


def done(step: int) -> JournaledStep:
    return JournaledStep(step, step + 1, [0.5], [1.0], [{"head": "a"}] * RANKS, [{}] * RANKS, {"a": step}, {"b": 7})


def test_rows_are_read_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rank-0000.rows"
    for attempt in range(2):  # a step that is made again starts anew
        written = [share(attempt, (5, 1, 8)), share(9, ()), share(3, (2,))]
        journal = RankJournal(path, written)
        journal.add(update(0))
        journal.add(update(2))
        journal.close()
    found = read_rows(path)
    assert [one.counts for one in found.shares] == [(3, 0), (0, 0), (1, 0)]
    for before, after in zip(written, found.shares, strict=True):
        for name in ("token_ids", "loss_mask", "offsets", "rollout_logprobs", "sample_index", "staleness"):
            expected, got = getattr(before.batch, name), getattr(after.batch, name)
            assert (expected.dtype, expected.tobytes()) == (got.dtype, got.tobytes())
    assert [one.number for one in found.updates] == [0, 2]
    assert found.updates[1].advantages.tobytes() == update(2).advantages.tobytes()
    assert found.updates[1].weights.tobytes() == update(2).weights.tobytes()


def test_what_a_killed_process_wrote_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    journal = RankJournal(tmp_path / "rows", [share(0, (3,))])
    journal.add(update(0))
    assert len(read_rows(tmp_path / "rows").updates) == 1
    journal.close()


@pytest.mark.parametrize("cut", [-1, 40, "flip"])
def test_rows_that_are_cut_off_or_changed_are_refused(tmp_path: Path, cut: int | str) -> None:
    path = tmp_path / "rows"
    journal = RankJournal(path, [share(0, (3,))])
    journal.close()
    content = bytearray(path.read_bytes())
    if isinstance(cut, int):
        path.write_bytes(content[:cut])
    else:
        content[-30] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="rows: is cut off or damaged"):
        read_rows(path)


def test_a_run_goes_on_after_the_last_whole_step_and_forgets_what_follows(tmp_path: Path) -> None:
    store, root = CheckpointStore(tmp_path / "checkpoints", keep=2), tmp_path / "journal"
    store.write("rl-000003", {"stage": "rl", "step": 3}, 1, lambda folder: None)
    journal = Journal(root / "rl")
    for step in range(2, 8):
        write(journal, step)
    rows = rows_path(journal.directory(6), 1)
    rows.write_bytes(rows.read_bytes()[:-1])
    found = resume_point(store, root, print)
    assert found is not None
    assert [step.step for step in found.journaled] == [3, 4, 5]
    assert found.journaled[-1] == done(5)
    assert found.record_bytes == {"b": 7}
    assert sorted(path.name for path in (root / "rl").iterdir()) == ["000002", "000003", "000004", "000005"]


def test_a_step_without_the_rows_of_a_rank_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    write(journal, 0)
    rows_path(journal.directory(0), 1).unlink()
    assert journal.following(0) == ()


def test_a_run_without_a_checkpoint_starts_with_an_empty_journal(tmp_path: Path) -> None:
    write(Journal(tmp_path / "journal" / "rl"), 0)
    assert resume_point(CheckpointStore(tmp_path / "checkpoints", keep=2), tmp_path / "journal", print) is None
    assert list((tmp_path / "journal").iterdir()) == []


def test_steps_that_no_checkpoint_needs_are_dropped(tmp_path: Path) -> None:
    store, root = CheckpointStore(tmp_path / "checkpoints", keep=2), tmp_path / "journal"
    for stage, step in (("rl", 2), ("rl", 4), ("dpo", 0)):
        store.write(f"{stage}-{step:06d}", {"stage": stage, "step": step}, 1, lambda folder: None)
        write(Journal(root / stage), step)
        write(Journal(root / stage), step + 1)
    write(Journal(root / "rl"), 3)
    keep_only(root, store.journaled_steps())
    assert sorted(str(path.relative_to(root)) for path in root.glob("*/*")) == [
        "dpo/000000",
        "dpo/000001",
        "rl/000004",
        "rl/000005",
    ]
