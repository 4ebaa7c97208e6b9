from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.batches import PairBatch, SupervisedBatch
from rlhf.training.batching import deal, idle_unit, micro_batch_count, micro_batches, micro_batches_of

row_lengths = st.lists(st.integers(2, 40), min_size=1, max_size=40)


def batch_of(lengths: list[int]) -> SupervisedBatch:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask[:, 0] = False
    ids = torch.arange(len(lengths))[:, None].expand_as(mask).clone()  # a row's tokens are its number
    return SupervisedBatch(ids, torch.tensor(lengths), mask, mask.float())


def pairs_of(lengths: list[int]) -> PairBatch:
    """Every length becomes a chosen completion of one token more than its rejected one."""
    rows = batch_of([n + extra for n in lengths for extra in (1, 0)])
    signs = torch.tensor([1.0, -1.0]).repeat(len(lengths))
    none = torch.zeros(len(rows), 0)
    return PairBatch(rows.token_ids, rows.lengths, rows.loss_mask, signs, none, rows.token_weights)


either_kind = pytest.mark.parametrize("make", [batch_of, pairs_of])


@either_kind
@given(lengths=row_lengths, ranks=st.integers(1, 9), size=st.integers(1, 7))
def test_every_row_is_trained_exactly_once_and_all_ranks_run_equally_many_micro_batches(
    make, lengths: list[int], ranks: int, size: int
) -> None:
    batch = make(lengths)
    unit = batch.rows_per_unit
    count = micro_batch_count(batch, ranks, size)
    seen, weight = [], 0.0
    for share in deal(batch, ranks):
        mine = batch.rows(share)
        parts = list(micro_batches(mine, size, count))
        assert len(parts) == count
        for index, rows in parts:
            assert len(rows) <= max(size, unit)
            assert len(rows) == max(unit, len(index))
            weight += float(rows.token_weights.sum())
            if len(index):
                assert torch.equal(rows.token_ids[:, 0], mine.token_ids[index, 0])
                seen += rows.token_ids[:, 0].tolist()
    assert sorted(seen) == list(range(len(batch)))
    assert weight == float(batch.token_weights.sum())


@given(lengths=row_lengths, ranks=st.integers(1, 9), size=st.integers(1, 7))
def test_the_two_completions_of_a_pair_stay_together_and_in_order(lengths: list[int], ranks: int, size: int) -> None:
    batch = pairs_of(lengths)
    count = micro_batch_count(batch, ranks, size)
    for share in deal(batch, ranks):
        for index, rows in micro_batches(batch.rows(share), size, count):
            numbers = rows.token_ids[:, 0]
            assert rows.advantages.tolist() == ([1.0, -1.0] * (len(rows) // 2) if len(index) else [0.0, 0.0])
            assert torch.equal(numbers[1::2], numbers[0::2] + (1 if len(index) else 0))


@either_kind
@given(lengths=row_lengths, ranks=st.integers(1, 9))
def test_ranks_get_unit_counts_that_differ_by_one_at_most(make, lengths: list[int], ranks: int) -> None:
    batch = make(lengths)
    shares = deal(batch, ranks)
    sizes = [len(share) / batch.rows_per_unit for share in shares]
    assert len(shares) == ranks
    assert max(sizes) - min(sizes) <= 1


def test_dealing_back_and_forth_gives_ranks_like_work() -> None:
    batch = batch_of([80, 70, 60, 50, 40, 30, 20, 10])
    assert [int(batch.lengths[share].sum()) for share in deal(batch, 2)] == [180, 180]


@given(lengths=row_lengths, size=st.integers(1, 7))
def test_micro_batches_go_from_long_to_short_and_are_cut_to_their_longest_row(lengths: list[int], size: int) -> None:
    batch = batch_of(lengths)
    parts = [rows for _, rows in micro_batches(batch, size, micro_batch_count(batch, 1, size))]
    assert [rows.token_ids.shape[1] for rows in parts] == [int(rows.lengths.max()) for rows in parts]
    together = torch.cat([rows.lengths for rows in parts]).tolist()
    assert together == sorted(lengths, reverse=True)


def test_pairs_go_by_the_longer_of_their_completions() -> None:
    batch = pairs_of([5, 9, 7])
    assert [rows.lengths.tolist() for _, rows in micro_batches(batch, 2, 3)] == [[10, 9], [8, 7], [6, 5]]


@either_kind
def test_a_rank_without_rows_runs_idle_units(make) -> None:
    empty = make([4, 5]).rows(torch.tensor([], dtype=torch.int64))
    parts = list(micro_batches(empty, 2, 3))
    assert [len(index) for index, _ in parts] == [0, 0, 0]
    assert all(not rows.loss_mask.any() for _, rows in parts)


@either_kind
def test_an_idle_unit_has_no_weight_and_the_dtypes_of_its_batch(make) -> None:
    batch = make([4, 5])
    idle = idle_unit(batch)
    assert idle.token_ids.shape == (batch.rows_per_unit, 2)
    assert idle.lengths.tolist() == [2] * batch.rows_per_unit
    assert idle.token_weights.abs().sum() == 0
    for item in fields(batch):
        assert getattr(idle, item.name).dtype == getattr(batch, item.name).dtype


def test_an_idle_unit_has_no_reference_where_its_batch_has_none() -> None:
    assert idle_unit(pairs_of([4, 5])).reference_logprobs.shape == (2, 0)


def test_rows_that_do_not_fit_the_micro_batches_are_not_dropped_in_silence() -> None:
    with pytest.raises(AssertionError, match="5 units, room for 2 x 2"):
        list(micro_batches(batch_of([2, 3, 4, 5, 6]), 2, 2))


@pytest.mark.parametrize(
    ("units", "ranks", "size", "count"), [(512, 2, 32, 8), (1, 4, 8, 1), (9, 2, 4, 2), (8, 2, 4, 1), (0, 2, 4, 1)]
)
def test_the_number_of_micro_batches_by_hand(units: int, ranks: int, size: int, count: int) -> None:
    assert micro_batches_of(units, ranks, size) == count


@pytest.mark.parametrize(("size", "count"), [(1, 3), (2, 3), (3, 3), (4, 2), (6, 1)])
def test_a_micro_batch_of_pairs_has_room_for_whole_pairs_and_at_least_one(size: int, count: int) -> None:
    assert micro_batch_count(pairs_of([2, 3, 4, 5, 6]), 2, size) == count
