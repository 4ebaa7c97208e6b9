"""The flat records that travel: made from samples and examples, selected, sliced and split."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.batches.ragged import (
    NO_TOKENS,
    PreferenceSequences,
    Sequences,
    TrainSequences,
    completion_sequences,
    rollout_batch,
    supervised_sequences,
    train_sequences,
    unit_sequences,
)
from rlhf.losses.reduce import sample_weights
from rlhf.samples import (
    Abstained,
    PreferencePair,
    RewardFailed,
    RewardValue,
    ScoredGroup,
    TokenizedExample,
    VersionSpan,
)
from tests.rlhf.toy_records import KINDS, pieces, record

MakeScored = Callable[..., ScoredGroup]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
lengths_st = st.lists(st.integers(1, 9), max_size=12)


def example(prompt: int, completion: int) -> TokenizedExample:
    total = prompt + completion
    return TokenizedExample(np.arange(total, dtype=np.int32), np.arange(total) >= prompt)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_rollout_batch_aligns_every_field_with_its_sample(make_scored: MakeScored) -> None:
    groups = [
        make_scored((1.0, 0.5), group_id="a", completion_tokens=[1, 3], version=4),
        make_scored((0.0, 0.25), group_id="b", completion_tokens=[2, 2], version=3),
    ]
    batch = rollout_batch(groups, version=5, correct_at=0.5)
    samples, sequences = batch.samples, batch.sequences.fetched()
    assert batch.sequences.lengths.tolist() == sequences.lengths.tolist()
    cut = [part.tolist() for part in sequences.per_sequence(sequences.token_ids)]
    assert cut == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert sequences.lengths.tolist() == [3, 5, 4, 4]
    assert sequences.trained_tokens.tolist() == samples.completion_tokens.tolist() == [1, 3, 2, 2]
    assert np.array_equal(sequences.rollout_logprobs, sequences.loss_mask * np.float32(-0.5))
    assert sequences.sample_index.tolist() == [0, 1, 2, 3]
    assert samples.rewards.tolist() == [1.0, 0.5, 0.0, 0.25]
    assert samples.correct.tolist() == [True, True, False, False]
    assert samples.group_index.tolist() == [0, 0, 1, 1]
    assert samples.staleness.tolist() == sequences.staleness.tolist() == [1, 1, 2, 2]
    assert len(samples) == len(sequences) == 4


def test_the_types_of_a_rollout_batch(make_scored: MakeScored) -> None:
    batch = rollout_batch([make_scored((1.0, 0.5))], version=0, correct_at=0.5)
    of_samples = {item.name: getattr(batch.samples, item.name).dtype for item in fields(batch.samples)}
    assert of_samples == {
        "rewards": torch.float32,
        "correct": torch.bool,
        "group_index": torch.int64,
        "completion_tokens": torch.int64,
        "staleness": torch.int64,
    }
    sequences = batch.sequences.fetched()
    of_tokens = {item.name: getattr(sequences, item.name).dtype.name for item in fields(sequences)}
    assert of_tokens == {
        "token_ids": "int32",
        "loss_mask": "bool",
        "offsets": "int64",
        "rollout_logprobs": "float32",
        "sample_index": "int64",
        "staleness": "int64",
    }


def test_samples_without_a_reward_value_are_left_out(make_scored: MakeScored) -> None:
    outcomes = (1.0, Abstained("math", "no"), RewardFailed("math", "m", "t", 2), 0.0)
    batch = rollout_batch([make_scored(outcomes, completion_tokens=[1, 2, 3, 4])], version=0, correct_at=1.0)
    assert batch.samples.rewards.tolist() == [1.0, 0.0]
    assert batch.sequences.fetched().lengths.tolist() == [3, 6]
    assert batch.sequences.sample_index.tolist() == [0, 1]


def test_selected_sequences_bring_no_group_along_that_they_do_not_need(make_scored: MakeScored) -> None:
    groups = [make_scored((1.0, 0.0), group_id=g, completion_tokens=[n, n + 1]) for g, n in (("a", 1), ("b", 3))]
    whole = rollout_batch(groups, 0, 1.0).sequences
    chosen = whole.select(np.array([3, 2]))
    assert chosen.stored == (groups[1].group.stored,)
    assert chosen.fetched().lengths.tolist() == [6, 5]
    assert chosen.fetched().sample_index.tolist() == [3, 2]
    mixed, index = whole.select(np.array([2, 0])).fetched(), np.array([2, 0])
    expected = whole.fetched().select(index)
    assert all(np.array_equal(getattr(mixed, item.name), getattr(expected, item.name)) for item in fields(mixed))


def test_no_sequences_fetch_to_none(make_scored: MakeScored) -> None:
    empty = rollout_batch([make_scored((1.0, 0.0))], 0, 1.0).sequences.select(np.zeros(0, np.int64)).fetched()
    assert (len(empty), empty.token_ids.dtype, empty.lengths.tolist()) == (0, np.int32, [])


def test_tokens_beyond_the_staleness_bound_do_not_train_and_others_of_their_sample_do(make_scored: MakeScored) -> None:
    spans = [(VersionSpan(2, 0, 3), VersionSpan(4, 3, 5)), (VersionSpan(2, 0, 2),), (VersionSpan(5, 0, 2),)]
    group = make_scored((1.0, 0.0, 0.5), completion_tokens=[5, 2, 2], spans=spans)
    batch = rollout_batch([group], version=5, correct_at=1.0, max_staleness=1)
    assert batch.samples.rewards.tolist() == [1.0, 0.5]
    assert batch.samples.completion_tokens.tolist() == [2, 2]
    assert batch.samples.staleness.tolist() == [1, 0]
    found = batch.sequences.fetched()
    assert found.lengths.tolist() == [7, 4]
    assert found.trained_tokens.tolist() == [2, 2]
    assert found.loss_mask[:7].tolist() == [False] * 5 + [True] * 2
    assert group.group.stored.tokens().loss_mask[:7].tolist() == [False] * 2 + [True] * 5


def test_what_is_correct_is_said_by_the_task_value_not_by_the_shaped_reward(make_scored: MakeScored) -> None:
    shaped = make_scored((RewardValue(0.2, 1.0, {}), RewardValue(1.4, 0.0, {})))
    assert rollout_batch([shaped], version=0, correct_at=1.0).samples.correct.tolist() == [True, False]


def test_each_stage_keeps_what_the_stage_before_had(make_scored: MakeScored) -> None:
    before = rollout_batch([make_scored((1.0, 0.5, 0.0), completion_tokens=[1, 3, 2])], 0, 1.0).sequences.fetched()
    advantages, weights = np.array([1.0, 2.0, 3.0], np.float32), np.array([0.5, 0.25, 0.25], np.float32)
    after = train_sequences(before, advantages, weights, reference_logprobs=np.ones(12, np.float32))
    assert isinstance(after, TrainSequences)
    assert all(getattr(after, item.name) is getattr(before, item.name) for item in fields(before))
    assert after.advantages.tolist() == [1.0, 2.0, 3.0]
    assert after.weights.tolist() == [0.5, 0.25, 0.25]
    assert after.proximal_logprobs.shape == (0,)
    assert after.reference_logprobs.tolist() == [1.0] * 12


# --- stored completions -----------------------------------------------------------------------------------------------


def test_a_supervised_step_weighs_its_own_trained_tokens() -> None:
    found = supervised_sequences([example(2, 1), example(1, 3)], lambda tokens: sample_weights(tokens, "sequence_mean"))
    assert found.lengths.tolist() == [3, 4]
    assert found.trained_tokens.tolist() == [1, 3]
    assert found.weights.tolist() == pytest.approx([1 / 2, 1 / 6])
    assert found.weights.dtype == np.float32


def test_completions_stay_in_their_order_whatever_integers_they_come_in() -> None:
    wide = TokenizedExample(np.array([7, 8, 9], np.int64), np.array([False, True, True]))
    found = completion_sequences([example(1, 1), wide])
    assert found.token_ids.tolist() == [0, 1, 7, 8, 9]
    assert found.token_ids.dtype == np.int32
    assert found.loss_mask.tolist() == [False, True, False, True, True]
    assert found.offsets.tolist() == [0, 2, 5]


def test_the_completions_of_units_follow_each_other() -> None:
    pairs = [PreferencePair(str(n), example(1, 1 + n), example(1, 3)) for n in range(2)]
    assert unit_sequences(pairs).lengths.tolist() == [2, 4, 3, 4]


def test_the_first_token_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="the first token has no log-prob"):
        TokenizedExample(np.array([1, 2]), np.array([True, True]))


# --- selection and cuts -----------------------------------------------------------------------------------------------


@every_kind
@given(lengths=lengths_st, data=st.data())
def test_a_selection_has_the_sequences_at_its_index_in_every_field(
    kind: type[Sequences], lengths: list[int], data: st.DataObject
) -> None:
    sequences = record(kind, lengths)
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=15)) if lengths else []
    found = sequences.select(np.array(index, np.int64))
    assert type(found) is kind
    assert len(found) == len(index)
    whole = pieces(sequences)
    assert pieces(found) == [whole[number] for number in index]
    for item in fields(kind):
        assert getattr(found, item.name).dtype == getattr(sequences, item.name).dtype, item.name
        assert getattr(found, item.name).flags.c_contiguous


@every_kind
@given(lengths=lengths_st, data=st.data())
def test_parts_of_a_split_are_the_sequences_one_after_the_other(
    kind: type[Sequences], lengths: list[int], data: st.DataObject
) -> None:
    sequences = record(kind, lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=5)))
    counts = np.diff([0, *cuts, len(lengths)]).tolist()
    parts = list(sequences.split(counts))
    assert [len(part) for part in parts] == counts
    assert [piece for part in parts for piece in pieces(part)] == pieces(sequences)
    assert all(int(part.offsets[0]) == 0 and int(part.offsets[-1]) == len(part.token_ids) for part in parts)


@every_kind
@given(lengths=lengths_st, data=st.data())
def test_a_slice_is_the_selection_of_its_range_without_a_copy(
    kind: type[Sequences], lengths: list[int], data: st.DataObject
) -> None:
    sequences = record(kind, lengths)
    start = data.draw(st.integers(0, len(lengths)))
    stop = data.draw(st.integers(start, len(lengths)))
    found = sequences.slice(start, stop)
    assert pieces(found) == pieces(sequences.select(np.arange(start, stop)))
    if start < stop:
        changed = [item.name for item in fields(kind) if item.name != "offsets"]
        assert all(np.shares_memory(getattr(found, name), getattr(sequences, name)) for name in changed)


@every_kind
@given(lengths=lengths_st)
def test_a_permutation_and_its_inverse_give_the_record_again(kind: type[Sequences], lengths: list[int]) -> None:
    sequences = record(kind, lengths)
    order = np.random.default_rng(1).permutation(len(lengths))
    again = sequences.select(order).select(np.argsort(order))
    assert all(np.array_equal(getattr(again, item.name), getattr(sequences, item.name)) for item in fields(kind))


@every_kind
@given(lengths=lengths_st)
def test_lengths_and_trained_tokens_are_those_of_a_loop(kind: type[Sequences], lengths: list[int]) -> None:
    sequences = record(kind, lengths)
    assert sequences.lengths.tolist() == lengths
    assert sequences.trained_tokens.tolist() == [sum(piece["loss_mask"]) for piece in pieces(sequences)]


@every_kind
@given(lengths=lengths_st)
def test_values_over_tokens_are_cut_by_sequence(kind: type[Sequences], lengths: list[int]) -> None:
    sequences = record(kind, lengths)
    cut = sequences.per_sequence(sequences.token_ids * 2)
    assert [part.tolist() for part in cut] == [[2 * t for t in piece["token_ids"]] for piece in pieces(sequences)]


@every_kind
def test_no_sequences_are_a_record_too(kind: type[Sequences]) -> None:
    for none in (record(kind, [4, 2]).select(np.zeros(0, np.int64)), record(kind, [4, 2]).slice(1, 1)):
        assert len(none) == 0
        assert none.token_ids.shape == (0,)
        assert none.trained_tokens.shape == none.lengths.shape == (0,)


@pytest.mark.parametrize("kind", [TrainSequences, PreferenceSequences], ids=lambda kind: kind.__name__)
def test_log_probs_that_are_not_there_stay_away_in_every_cut(
    kind: type[TrainSequences | PreferenceSequences],
) -> None:
    without = replace(record(kind, [3, 2, 4]), reference_logprobs=NO_TOKENS)
    for found in (without.select(np.array([2, 0])), without.slice(0, 2), *without.split([1, 2])):
        assert found.reference_logprobs.shape == (0,)
        assert found.advantages.shape == (len(found),)


@every_kind
def test_a_record_survives_the_way_to_another_process(kind: type[Sequences]) -> None:
    sequences = record(kind, [3, 2, 4])
    assert pieces(pickle.loads(pickle.dumps(sequences))) == pieces(sequences)
