from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.batches import SupervisedBatch
from rlhf.training.batching import deal, idle_row, micro_batch_count, micro_batches

row_lengths = st.lists(st.integers(2, 40), min_size=1, max_size=40)


def batch_of(lengths: list[int]) -> SupervisedBatch:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask[:, 0] = False
    ids = torch.arange(len(lengths))[:, None].expand_as(mask).clone()  # a row's tokens are its number
    return SupervisedBatch(ids, torch.tensor(lengths), mask, mask.float())


@given(lengths=row_lengths, ranks=st.integers(1, 9), size=st.integers(1, 7))
def test_every_row_is_trained_exactly_once_and_all_ranks_run_equally_many_micro_batches(
    lengths: list[int], ranks: int, size: int
) -> None:
    batch = batch_of(lengths)
    count = micro_batch_count(len(batch), ranks, size)
    seen, weight = [], 0.0
    for share in deal(batch.lengths, ranks):
        mine = batch.rows(share)
        parts = list(micro_batches(mine, size, count))
        assert len(parts) == count
        for index, rows in parts:
            assert len(rows) <= size
            assert len(rows) == max(1, len(index))
            weight += float(rows.token_weights.sum())
            if len(index):
                assert torch.equal(rows.token_ids[:, 0], mine.token_ids[index, 0])
                seen += rows.token_ids[:, 0].tolist()
    assert sorted(seen) == list(range(len(lengths)))
    assert weight == float(batch.token_weights.sum())


@given(lengths=row_lengths, ranks=st.integers(1, 9))
def test_ranks_get_row_counts_that_differ_by_one_at_most(lengths: list[int], ranks: int) -> None:
    shares = deal(torch.tensor(lengths), ranks)
    sizes = [len(share) for share in shares]
    assert len(shares) == ranks
    assert max(sizes) - min(sizes) <= 1


def test_dealing_back_and_forth_gives_ranks_like_work() -> None:
    lengths = torch.tensor([80, 70, 60, 50, 40, 30, 20, 10])
    assert [int(lengths[share].sum()) for share in deal(lengths, 2)] == [180, 180]


@given(lengths=row_lengths, size=st.integers(1, 7))
def test_micro_batches_go_from_long_to_short_and_are_cut_to_their_longest_row(lengths: list[int], size: int) -> None:
    parts = [rows for _, rows in micro_batches(batch_of(lengths), size, micro_batch_count(len(lengths), 1, size))]
    assert [rows.token_ids.shape[1] for rows in parts] == [int(rows.lengths.max()) for rows in parts]
    together = torch.cat([rows.lengths for rows in parts]).tolist()
    assert together == sorted(lengths, reverse=True)


def test_a_rank_without_rows_runs_idle_rows() -> None:
    empty = batch_of([4, 5]).rows(torch.tensor([], dtype=torch.int64))
    parts = list(micro_batches(empty, 2, 3))
    assert [len(index) for index, _ in parts] == [0, 0, 0]
    assert all(not rows.loss_mask.any() for _, rows in parts)


def test_an_idle_row_has_no_weight_and_the_dtypes_of_its_batch() -> None:
    batch = batch_of([4, 5])
    idle = idle_row(batch)
    assert idle.token_ids.shape == (1, 2)
    assert idle.lengths.tolist() == [2]
    assert idle.token_weights.abs().sum() == 0
    for item in fields(batch):
        assert getattr(idle, item.name).dtype == getattr(batch, item.name).dtype


def test_rows_that_do_not_fit_the_micro_batches_are_not_dropped_in_silence() -> None:
    with pytest.raises(AssertionError, match="5 rows, room for 2 x 2"):
        list(micro_batches(batch_of([2, 3, 4, 5, 6]), 2, 2))


@pytest.mark.parametrize(
    ("rows", "ranks", "size", "count"), [(512, 2, 32, 8), (1, 4, 8, 1), (9, 2, 4, 2), (8, 2, 4, 1), (0, 2, 4, 1)]
)
def test_the_number_of_micro_batches_by_hand(rows: int, ranks: int, size: int, count: int) -> None:
    assert micro_batch_count(rows, ranks, size) == count
