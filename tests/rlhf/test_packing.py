"""Micro-batches: every sequence once, units whole, no more tokens than the budget, like work on every rank."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Exaone4Config, Exaone4ForCausalLM

from rlhf.batches import packing
from rlhf.batches.packing import BatchPlan, WorkModel, plan_batch
from rlhf.batches.ragged import PairSequences, Sequences, SupervisedSequences, TrainSequences
from tests.rlhf.toy_records import pieces, record

QUADRATIC = WorkModel(linear=1.0, full=0.05, windowed=0.02, window=8)
works = st.sampled_from([WorkModel(), QUADRATIC])


@st.composite
def batches(draw: st.DrawFn) -> Sequences:
    kinds: list[type[Sequences]] = [SupervisedSequences, TrainSequences, PairSequences]
    kind = draw(st.sampled_from(kinds))
    lengths = draw(st.lists(st.integers(1, 40), max_size=40))
    return record(kind, lengths[: len(lengths) // kind.unit_size * kind.unit_size])


def micro_batches(plan: BatchPlan) -> list[np.ndarray]:
    return [part for rank in plan.ranks for part in rank]


# --- the plan ---------------------------------------------------------------------------------------------------------


@given(sequences=batches(), ranks=st.integers(1, 9), token_budget=st.integers(1, 200), work=works)
def test_every_sequence_is_in_one_micro_batch_and_all_ranks_run_equally_many(
    sequences: Sequences, ranks: int, token_budget: int, work: WorkModel
) -> None:
    plan = plan_batch(sequences, ranks, token_budget, work)
    assert len(plan.ranks) == ranks
    assert {len(rank) for rank in plan.ranks} == {plan.micro_batches}
    assert plan.micro_batches >= 1
    everything = [number for part in micro_batches(plan) for number in part.tolist()]
    assert sorted(everything) == list(range(len(sequences)))
    assert [index.tolist() for index in plan.index] == [
        [number for part in rank for number in part.tolist()] for rank in plan.ranks
    ]


@given(sequences=batches(), ranks=st.integers(1, 9), token_budget=st.integers(1, 200), work=works)
def test_a_unit_stays_whole_and_in_order(sequences: Sequences, ranks: int, token_budget: int, work: WorkModel) -> None:
    size = type(sequences).unit_size
    for part in micro_batches(plan_batch(sequences, ranks, token_budget, work)):
        units = part.reshape(-1, size)
        assert (units[:, 0] % size == 0).all()
        assert np.array_equal(units, units[:, :1] + np.arange(size))
        assert all(a < b for a, b in pairwise(units[:, 0].tolist()))


@given(sequences=batches(), ranks=st.integers(1, 9), token_budget=st.integers(1, 200), work=works)
def test_a_micro_batch_has_no_more_tokens_than_the_budget_unless_it_is_one_unit(
    sequences: Sequences, ranks: int, token_budget: int, work: WorkModel
) -> None:
    for part in micro_batches(plan_batch(sequences, ranks, token_budget, work)):
        assert sequences.lengths[part].sum() <= token_budget or len(part) == type(sequences).unit_size


@given(sequences=batches(), ranks=st.integers(1, 9), token_budget=st.integers(1, 200), work=works)
def test_the_plan_is_the_same_every_time(sequences: Sequences, ranks: int, token_budget: int, work: WorkModel) -> None:
    first, second = (plan_batch(sequences, ranks, token_budget, work) for _ in range(2))
    assert all(map(np.array_equal, micro_batches(first), micro_batches(second)))


@given(sequences=batches(), slots=st.integers(1, 200))
def test_padded_scalars_have_a_bound_of_their_own(sequences: Sequences, slots: int) -> None:
    """One long sequence among many short ones would pad them all to its length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PADDED_SLOTS", slots)
        plan = plan_batch(sequences, 2, 10_000, WorkModel())
    for part in micro_batches(plan):
        padded = len(part) * int(sequences.lengths[part].max(initial=0))
        assert padded <= slots or len(part) == type(sequences).unit_size


def test_padded_scalars_of_a_micro_batch_take_64_mib_at_most() -> None:
    assert packing._PADDED_SLOTS * 4 == 64 * 2**20


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "count"),
    [
        ([10] * 8, 2, 40, 1),
        ([10] * 8, 2, 39, 2),  # three of ten fit into 39
        ([10] * 8, 2, 20, 2),
        ([10] * 8, 2, 19, 4),
        ([10] * 9, 2, 20, 3),  # nine of ten need five micro-batches, ranks run equally many
        ([10] * 8, 3, 1, 3),  # each alone
        ([100, 10, 10], 1, 50, 2),  # the first alone, above the budget
        ([10], 4, 40, 1),
        ([7, 7, 7, 1], 1, 13, 3),  # all would fit twice 13, but two of seven are 14
    ],
)
def test_the_number_of_micro_batches_by_hand(lengths: list[int], ranks: int, budget: int, count: int) -> None:
    sequences = record(SupervisedSequences, lengths)
    assert plan_batch(sequences, ranks, budget, WorkModel()).micro_batches == count


def test_a_batch_without_sequences_is_one_empty_micro_batch_for_each_rank() -> None:
    plan = plan_batch(record(PairSequences, []), 3, 100, WorkModel())
    assert [[part.tolist() for part in rank] for rank in plan.ranks] == [[[]]] * 3


@given(sequences=batches(), ranks=st.integers(1, 9), token_budget=st.integers(1, 200))
def test_no_rank_runs_more_micro_batches_than_there_are_units(
    sequences: Sequences, ranks: int, token_budget: int
) -> None:
    units = len(sequences) // type(sequences).unit_size
    plan = plan_batch(sequences, ranks, token_budget, WorkModel())
    assert plan.micro_batches <= max(1, math.ceil(units / ranks))


def test_pairs_are_planned_by_both_of_their_completions() -> None:
    plan = plan_batch(record(PairSequences, [30, 2, 16, 16, 2, 30, 16, 16]), 1, 64, WorkModel())
    assert [part.tolist() for part in plan.ranks[0]] == [[0, 1, 4, 5], [2, 3, 6, 7]]


# --- balance ----------------------------------------------------------------------------------------------------------


def log_normal(count: int, seed: int) -> np.ndarray:
    """Lengths of 16 to 4,096 tokens, most of them short."""
    drawn = np.random.default_rng(seed).lognormal(math.log(256), 1.0, count)
    return np.clip(drawn, 16, 4096).astype(np.int64)


def bare(lengths: np.ndarray, kind: type[Any] = Sequences) -> Any:
    """Only lengths: what a plan looks at."""
    tokens = int(lengths.sum())
    columns = {"token_ids": np.zeros(tokens, np.int32), "loss_mask": np.zeros(tokens, bool)}
    none = np.zeros(len(lengths), np.float32)
    others = {"advantages": none, "weights": none, "reference_logprobs": np.zeros(0, np.float32)}
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return kind(**columns, offsets=offsets, **(others if kind is PairSequences else {}))


SMALL = WorkModel.of(
    SimpleNamespace(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49_152
    )
)
"""At 4,096 tokens its attention is a third of its work."""


@pytest.mark.parametrize("kind", [Sequences, PairSequences], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("work", [WorkModel(), SMALL], ids=["by token", "with attention"])
@pytest.mark.parametrize(("ranks", "budget"), [(2, 4096), (4, 8192), (8, 4096), (8, 16_384)])
@pytest.mark.parametrize("seed", range(5))
def test_the_slowest_rank_has_little_more_work_than_the_mean(
    kind: type[Any], work: WorkModel, ranks: int, budget: int, seed: int
) -> None:
    sequences = bare(log_normal(600, seed), kind)
    plan = plan_batch(sequences, ranks, budget, work)
    of_ranks = np.array([work(sequences.lengths[index]).sum() for index in plan.index])
    assert of_ranks.max() / of_ranks.mean() < 1.1
    # Ranks wait for each other at every micro-batch, so those of one turn must be alike too.
    of_turns = np.array([[work(sequences.lengths[part]).sum() for part in rank] for rank in plan.ranks]).T
    assert of_turns.max(-1).sum() / of_turns.mean(-1).sum() < 1.1


def test_snake_order_gives_ranks_like_work_where_micro_batches_differ() -> None:
    sequences = bare(np.array([80, 70, 60, 50, 40, 30, 20, 10]))
    plan = plan_batch(sequences, 2, 80, WorkModel())
    of_ranks = [[int(sequences.lengths[part].sum()) for part in rank] for rank in plan.ranks]
    assert of_ranks == [[80, 50, 50], [70, 60, 50]]


@pytest.mark.parametrize("budget", [4096, 16_384])
@pytest.mark.parametrize("ranks", [1, 4])
def test_micro_batches_are_nearly_full(ranks: int, budget: int) -> None:
    sequences = bare(log_normal(600, 0))
    fewest = math.ceil(int(sequences.offsets[-1]) / (budget * ranks))
    assert plan_batch(sequences, ranks, budget, WorkModel()).micro_batches <= math.ceil(1.1 * fewest)


def test_many_sequences_are_planned_in_a_moment() -> None:
    lengths = log_normal(20_000, 0)
    plan = plan_batch(bare(lengths), 16, 16_384, WorkModel())
    assert sum(len(part) for part in micro_batches(plan)) == 20_000


# --- shares -----------------------------------------------------------------------------------------------------------


@given(sequences=batches(), ranks=st.integers(1, 5), token_budget=st.integers(1, 200))
def test_shares_hold_the_planned_sequences_in_the_order_of_their_micro_batches(
    sequences: Sequences, ranks: int, token_budget: int
) -> None:
    plan = plan_batch(sequences, ranks, token_budget, WorkModel())
    whole, shares = pieces(sequences), plan.shares(sequences)
    assert len(shares) == ranks
    for share, parts in zip(shares, plan.ranks, strict=True):
        assert type(share.batch) is type(sequences)
        assert share.counts == tuple(len(part) for part in parts)
        found = [pieces(one) for one in share.micro_batches()]
        assert found == [[whole[number] for number in part] for part in parts]


@given(sequences=batches(), ranks=st.integers(1, 5), token_budget=st.integers(1, 200))
def test_values_of_the_ranks_find_their_way_back_to_the_batch(
    sequences: Sequences, ranks: int, token_budget: int
) -> None:
    plan = plan_batch(sequences, ranks, token_budget, WorkModel())
    out = np.full(len(sequences.token_ids), -1)
    for index, share in zip(plan.index, plan.shares(sequences), strict=True):
        answers = share.batch.per_sequence(share.batch.token_ids)
        for number, values in zip(index, answers, strict=True):
            out[sequences.offsets[number] : sequences.offsets[number + 1]] = values
    assert np.array_equal(out, sequences.token_ids)


# --- the work of a sequence -------------------------------------------------------------------------------------------


def exaone(**changes: Any) -> Exaone4Config:
    """Three of four layers see a window of 32 tokens, the last one sees all."""
    settings: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    }
    return Exaone4Config(**settings | changes)


def test_the_work_of_a_hybrid_exaone_by_hand() -> None:
    work = WorkModel.of(exaone())
    # Queries and output 64 x 64 each, keys and values 64 x 32 each; three matrices of 64 x 128; the head 64 x 1000.
    linear = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 1000
    # Each visible pair of tokens: 4 heads of 16, once for the score and once for the value.
    pair = 2 * 4 * 16
    assert work == WorkModel(linear=linear, full=pair, windowed=3 * pair, window=32)
    found = work(np.array([1, 10, 32, 100]))
    # Up to the window of 32 a sliding layer looks at as many pairs as a full one.
    assert found.tolist() == [
        linear * 1 + 4 * pair * 0.5,
        linear * 10 + 4 * pair * 50,
        linear * 32 + 4 * pair * 512,
        linear * 100 + pair * 5000 + 3 * pair * (3200 - 512),
    ]


@pytest.mark.parametrize("changes", [{}, {"head_dim": 32}, {"num_key_value_heads": 4, "intermediate_size": 96}])
def test_the_work_of_a_token_counts_the_weights_of_all_linear_layers(changes: dict[str, Any]) -> None:
    config = exaone(**changes)
    with torch.device("meta"):
        model = Exaone4ForCausalLM(config)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert WorkModel.of(config).linear == weights


def test_what_a_configuration_lacks_counts_as_a_plain_dense_decoder_s() -> None:
    plain = SimpleNamespace(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000)
    assert WorkModel.of(plain) == WorkModel(
        linear=4 * (4 * 64 * 64 + 3 * 64 * 256) + 64 * 1000, full=4 * 128, windowed=0.0, window=1
    )


def test_all_layers_with_a_window_have_work_that_grows_with_the_length_alone() -> None:
    work = WorkModel.of(exaone(layer_types=["sliding_attention"] * 4))
    assert work.full == 0
    once, twice, thrice = work(np.array([1000, 2000, 3000])).tolist()
    assert thrice - twice == twice - once
