from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlhf.batches import AnnotatedBatch, RolloutBatch, annotated, pad, rollout_batch, supervised_batch, train_batch
from rlhf.losses.reduce import token_weights
from rlhf.samples import Abstained, RewardFailed, RewardValue, ScoredGroup, TokenizedExample

MakeScored = Callable[..., ScoredGroup]


def test_padding_puts_zeros_on_the_right() -> None:
    found = pad([np.array([1, 2, 3], np.int32), np.array([4], np.int32)], torch.int64)
    assert found.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert found.dtype == torch.int64


def test_read_only_arrays_as_ray_delivers_them_are_copied_without_a_warning() -> None:
    array = np.array([1.5, 2.5], np.float32)
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pad([array], torch.float32)
    found[0, 0] = 9.0
    assert array[0] == 1.5


def test_a_rollout_batch_aligns_every_field_with_its_sample(make_scored: MakeScored) -> None:
    groups = [
        make_scored((1.0, 0.5), group_id="a", completion_tokens=[1, 3], version=4),
        make_scored((0.0, 0.25), group_id="b", completion_tokens=[2, 2], version=3),
    ]
    batch = rollout_batch(groups, version=5, correct_at=0.5)
    assert batch.token_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 0], [1, 2, 3, 4, 0]]
    assert batch.lengths.tolist() == [3, 5, 4, 4]
    assert batch.loss_mask.sum(-1).tolist() == [1, 3, 2, 2]
    assert torch.equal(batch.rollout_logprobs, batch.loss_mask * -0.5)
    assert batch.rewards.tolist() == [1.0, 0.5, 0.0, 0.25]
    assert batch.correct.tolist() == [True, True, False, False]
    assert batch.group_index.tolist() == [0, 0, 1, 1]
    assert batch.staleness.tolist() == [1, 1, 2, 2]


def test_samples_without_a_reward_value_are_left_out(make_scored: MakeScored) -> None:
    outcomes = (1.0, Abstained("math", "no"), RewardFailed("math", "m", "t", 2), 0.0)
    batch = rollout_batch([make_scored(outcomes, completion_tokens=[1, 2, 3, 4])], version=0, correct_at=1.0)
    assert batch.rewards.tolist() == [1.0, 0.0]
    assert batch.lengths.tolist() == [3, 6]


def test_what_is_correct_is_said_by_the_task_value_not_by_the_shaped_reward(make_scored: MakeScored) -> None:
    shaped = make_scored((RewardValue(0.2, 1.0, {}), RewardValue(1.4, 0.0, {})))
    batch = rollout_batch([shaped], version=0, correct_at=1.0)
    assert batch.correct.tolist() == [True, False]
    assert batch.correct.dtype == torch.bool


def test_where_no_reference_is_needed_its_log_probs_have_no_tokens(make_scored: MakeScored) -> None:
    batch = annotated_batch(make_scored)
    assert batch.reference_logprobs.shape == (3, 0)
    assert batch.rows(torch.tensor([1])).reference_logprobs.shape == (1, 0)
    with_reference = annotated(batch_without_annotation(make_scored), batch.proximal_logprobs, torch.ones(3, 5))
    assert with_reference.rows(torch.tensor([0])).reference_logprobs.tolist() == [[1, 1, 1]]


def annotated_batch(make_scored: MakeScored) -> AnnotatedBatch:
    return annotated(batch_without_annotation(make_scored), torch.arange(15.0).view(3, 5))


def batch_without_annotation(make_scored: MakeScored) -> RolloutBatch:
    return rollout_batch([make_scored((1.0, 0.5, 0.0), completion_tokens=[1, 3, 2])], version=0, correct_at=1.0)


def test_rows_are_chosen_in_every_field_and_cut_to_the_longest(make_scored: MakeScored) -> None:
    whole = annotated_batch(make_scored)
    rows = whole.rows(torch.tensor([2, 0]))
    assert isinstance(rows, AnnotatedBatch)
    assert rows.token_ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, 0]]
    assert rows.proximal_logprobs.tolist() == [[10, 11, 12, 13], [0, 1, 2, 3]]
    assert rows.rewards.tolist() == [0.0, 1.0]
    assert len(rows) == 2


def test_no_rows_are_a_batch_too(make_scored: MakeScored) -> None:
    rows = annotated_batch(make_scored).rows(torch.tensor([], dtype=torch.int64))
    assert len(rows) == 0
    assert rows.token_ids.shape == (0, 1)


def test_each_stage_keeps_what_the_stage_before_had(make_scored: MakeScored) -> None:
    before = annotated_batch(make_scored)
    weights = token_weights(before.loss_mask, "sequence_mean")
    after = train_batch(before, torch.tensor([1.0, 2.0, 3.0]), weights)
    assert after.proximal_logprobs is before.proximal_logprobs
    assert after.advantages.tolist() == [1.0, 2.0, 3.0]
    assert after.token_weights is weights


def test_a_supervised_batch_weighs_its_own_mask() -> None:
    def example(prompt: int, completion: int) -> TokenizedExample:
        total = prompt + completion
        return TokenizedExample(np.arange(total, dtype=np.int32), np.arange(total) >= prompt)

    batch = supervised_batch([example(2, 1), example(1, 3)], lambda mask: token_weights(mask, "token_mean"))
    assert batch.lengths.tolist() == [3, 4]
    assert batch.token_weights.tolist() == [[0, 0, 0.25, 0], [0, 0.25, 0.25, 0.25]]


def test_the_first_token_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="the first token has no log-prob"):
        TokenizedExample(np.array([1, 2]), np.array([True, True]))
