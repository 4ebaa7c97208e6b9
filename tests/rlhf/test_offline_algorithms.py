"""Preference algorithms from units to the loss of an optimiser step; the laws they share are in test_algorithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf import algorithms
from rlhf.algorithms.dpo import Dpo
from rlhf.algorithms.grouper import Grouper
from rlhf.algorithms.offline import OfflineAlgorithm
from rlhf.algorithms.simper import Simper
from rlhf.batches import PairBatch, PreferenceBatch, Rows
from rlhf.batches.padded import padded
from rlhf.batches.ragged import PairSequences, with_reference
from rlhf.samples import PreferenceGroup, PreferencePair, PreferenceUnit, TokenizedExample

F64 = torch.float64
LENGTHS = (3, 1, 2, 4, 1, 1)


def example(completion_tokens: int, start: int = 0) -> TokenizedExample:
    mask = np.arange(completion_tokens + 2) >= 2
    return TokenizedExample(np.arange(start, start + completion_tokens + 2, dtype=np.int32), mask)


def pairs(lengths: tuple[int, ...] = LENGTHS) -> list[PreferencePair]:
    both = zip(lengths[0::2], lengths[1::2], strict=True)
    return [PreferencePair(f"p{i}", example(w, 10 * i), example(r, 10 * i)) for i, (w, r) in enumerate(both)]


def as_groups(of: list[PreferencePair]) -> list[PreferenceGroup]:
    return [PreferenceGroup(pair.pair_id, pair.completions, (0.8, 0.3)) for pair in of]


def group(rewards: tuple[float, ...], number: int = 0) -> PreferenceGroup:
    return PreferenceGroup(f"g{number}", tuple(example(1 + i % 3) for i in range(len(rewards))), rewards)


def batch_of(algorithm: OfflineAlgorithm, units: Sequence[PreferenceUnit]) -> PreferenceBatch:
    """One optimiser step as the formulas see it, without reference log-probs."""
    sequences = algorithm.batch(units)
    return padded(sequences, torch.zeros(int(sequences.loss_mask.sum()), dtype=F64))


def referenced(batch: PreferenceBatch, reference_logprobs: Tensor) -> PreferenceBatch:
    """The batch with the reference's log-probs [N, T]."""
    assert reference_logprobs.shape == batch.token_ids.shape
    return replace(batch, reference_logprobs=reference_logprobs)


def policy(batch: Rows, seed: int = 0) -> Tensor:
    """Log-probs [N, T], NaN off the mask."""
    noise = torch.rand(batch.loss_mask.shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return (-noise).masked_fill(~batch.loss_mask, math.nan).requires_grad_()


def step_loss(algorithm: OfflineAlgorithm, batch: PreferenceBatch, logprobs: Tensor) -> Tensor:
    loss = algorithm.token_loss(logprobs, batch).loss
    return (torch.where(batch.loss_mask, loss, 0.0) * batch.token_weights).sum()


def row_metric(algorithm: OfflineAlgorithm, batch: PreferenceBatch, logprobs: Tensor, name: str) -> list[float]:
    values, rows = algorithm.token_loss(logprobs, batch).row_metrics[f"preference/{name}"]
    return values[rows].tolist()


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_of_pairs_has_the_chosen_in_even_and_the_rejected_in_odd_rows() -> None:
    sequences = Simper().batch(pairs())
    assert isinstance(sequences, PairSequences)
    assert sequences.trained_tokens.tolist() == list(LENGTHS)
    assert sequences.token_ids[sequences.offsets[:-1]].tolist() == [0, 0, 10, 10, 20, 20]
    assert sequences.reference_logprobs.shape == (0,)
    batch = batch_of(Simper(), pairs())
    assert isinstance(batch, PairBatch)
    assert batch.loss_mask.sum(-1).tolist() == list(LENGTHS)
    assert batch.token_ids[:, 0].tolist() == [0, 0, 10, 10, 20, 20]
    assert batch.advantages.tolist() == [1.0, -1.0] * 3
    assert batch.reference_logprobs.shape == (6, 0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [((1.0, 0.0, 0.0, 0.0), [1, -1, -1, -1]), ((0.9, 0.5, 0.1, 0.3), [1, 0, -1, -0.5])],
)
def test_the_advantages_of_groups_by_hand(rewards: tuple[float, ...], expected: list[float]) -> None:
    batch = batch_of(Grouper(), [group(rewards), group((2.0, 4.0))])
    assert batch.advantages.dtype == torch.float32
    assert batch.advantages.tolist() == pytest.approx([*expected, -1, 1], abs=1e-7)


def test_groups_count_alike_whatever_their_size() -> None:
    batch = batch_of(Grouper(), [group((1.0, 0.0)), group((1.0, 0.0, 0.5, 0.5), 1)])
    value_of_rows = torch.tensor([3.0, 5.0, 1.0, 2.0, 3.0, 6.0], dtype=F64)  # means 4 and 3
    per_token = value_of_rows[:, None] / batch.loss_mask.sum(-1, keepdim=True) * batch.loss_mask
    assert (per_token * batch.token_weights).sum().item() == pytest.approx(3.5, abs=1e-6)


def test_reference_log_probs_stay_with_their_tokens_through_a_step() -> None:
    sequences = Dpo().batch([pairs()[2], pairs()[0]])  # of 1, 1, 3 and 1 completion tokens
    batch = with_reference(sequences, np.where(sequences.loss_mask, np.arange(14, dtype=np.float32), 0.0))
    assert isinstance(batch, PairSequences)
    shown = padded(batch.select(np.array([2, 3])), torch.zeros(4))
    assert shown.reference_logprobs.tolist() == [[0, 0, 8, 9, 10], [0, 0, 13, 0, 0]]
    with pytest.raises(AssertionError):
        with_reference(sequences, np.zeros(13, np.float32))


# --- SimPER and GROUPER -----------------------------------------------------------------------------------------------


def test_simper_by_hand() -> None:
    batch = batch_of(Simper(), pairs((2, 1)))
    logprobs = torch.tensor([[1, 1, 0.5, 0.125], [1, 1, 0.75, 1]], dtype=F64).log().requires_grad_()
    loss = step_loss(Simper(), batch, logprobs)
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 + 0.75, abs=1e-7)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [pytest.approx(row, abs=1e-7) for row in ([0, 0, -0.125, -0.125], [0, 0, 0.75, 0])]


def test_grouper_over_groups_of_two_is_exactly_half_of_simper() -> None:
    units = pairs()
    losses, gradients = [], []
    for algorithm, given in ((Simper(), units), (Grouper(), as_groups(units))):
        batch = batch_of(algorithm, given)
        logprobs = policy(batch)
        loss = step_loss(algorithm, batch, logprobs)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
    assert losses[0].item() == 2.0 * losses[1].item()
    assert torch.equal(gradients[0], 2.0 * gradients[1])
    assert gradients[0].abs().sum() > 0.1


def test_a_group_of_equal_rewards_trains_nothing() -> None:
    batch = batch_of(Grouper(), [group((0.1, 0.1, 0.1))])
    logprobs = policy(batch)
    step_loss(Grouper(), batch, logprobs).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().sum() == 0


# --- DPO --------------------------------------------------------------------------------------------------------------


def dpo_step(lengths: tuple[int, ...] = LENGTHS, **fields: Any) -> tuple[Dpo, PreferenceBatch, Tensor]:
    algorithm = Dpo(**fields)
    batch = batch_of(algorithm, pairs(lengths))
    return algorithm, referenced(batch, policy(batch, 1).detach()), policy(batch)


def test_dpo_at_the_reference_is_log_two_and_its_gradient_half_beta() -> None:
    algorithm, batch, logprobs = dpo_step()
    loss = step_loss(algorithm, referenced(batch, logprobs.detach()), logprobs)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert logprobs.grad is not None
    expected = -0.5 * 0.1 / 3 * batch.advantages[:, None] * batch.loss_mask
    torch.testing.assert_close(logprobs.grad, expected.to(F64), atol=1e-8, rtol=0)


def test_the_nll_is_of_the_chosen_completion_averaged_over_its_tokens() -> None:
    algorithm, batch, logprobs = dpo_step(nll_weight=0.25)
    plain = step_loss(Dpo(), batch, logprobs)
    with_nll = step_loss(algorithm, batch, logprobs)
    chosen = torch.stack([logprobs[i][batch.loss_mask[i]].mean() for i in (0, 2, 4)])
    assert (with_nll - plain).item() == pytest.approx(-0.25 * chosen.mean().item(), abs=1e-7)
    gradient = torch.autograd.grad(with_nll - plain, logprobs)[0]
    assert gradient[1::2].abs().sum() < 1e-8
    assert gradient[0::2][batch.loss_mask[0::2]].max() < 0


def test_dpo_of_completions_of_one_token_is_the_same_with_sums_and_averages() -> None:
    losses = [step_loss(*dpo_step((1, 1, 1, 1), length_normalised=flag)) for flag in (False, True)]
    assert losses[0].item() == losses[1].item()


def test_the_completion_of_a_pair_that_is_not_empty_carries_the_whole_pair() -> None:
    algorithm, batch, logprobs = dpo_step((3, 0))
    loss = step_loss(algorithm, batch, logprobs)
    margin = (logprobs - batch.reference_logprobs)[0][batch.loss_mask[0]].sum()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.1 * margin.item())), abs=1e-7)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert gradient.isfinite().all()
    assert gradient[0][batch.loss_mask[0]].max() < 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 0.0},
        {"label_smoothing": 0.5},
        {"nll_weight": -1.0},
        {"loss": "ipo", "label_smoothing": 0.1},
        {"loss": "ipo", "length_normalised": True},
    ],
)
def test_settings_of_dpo_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Dpo(**wrong)


# --- what all three share ---------------------------------------------------------------------------------------------

every_offline = pytest.mark.parametrize("name", ["dpo", "simper", "grouper"])


@every_offline
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed_length"])
def test_another_reduction_would_be_another_formula_and_is_refused(name: str, reduction: str) -> None:
    with pytest.raises(ValidationError, match="reduction"):
        algorithms.build(name, {"reduction": reduction})


@every_offline
def test_what_is_logged_is_what_the_page_of_the_algorithm_explains(name: str) -> None:
    algorithm = algorithms.build(name, {})
    assert isinstance(algorithm, OfflineAlgorithm)
    batch = batch_of(algorithm, as_groups(pairs()) if algorithm.needs.data == "groups" else pairs())
    if algorithm.needs.reference_logprobs:
        batch = referenced(batch, policy(batch, 1).detach())
    found = algorithm.token_loss(policy(batch), batch)
    assert {*found.metrics, *found.row_metrics} == set(algorithm.about.metrics)
    for values, rows in found.row_metrics.values():
        assert values.shape == rows.shape == (6,)
        assert rows.dtype == torch.bool
        assert not values.requires_grad
        assert values[rows].isfinite().all()


@every_offline
def test_units_of_empty_completions_count_in_no_metric_and_train_nothing(name: str) -> None:
    algorithm = algorithms.build(name, {})
    assert isinstance(algorithm, OfflineAlgorithm)
    empty = pairs((0,) * 6)
    batch = batch_of(algorithm, as_groups(empty) if algorithm.needs.data == "groups" else empty)
    batch = referenced(batch, policy(batch).detach())
    logprobs = torch.zeros(batch.token_ids.shape, dtype=F64, requires_grad=True)
    found = algorithm.token_loss(logprobs, batch)
    assert not any(rows.any() for _, rows in found.row_metrics.values())
    step_loss(algorithm, batch, logprobs).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().sum() == 0


def test_the_metrics_of_pairs_by_hand() -> None:
    batch = batch_of(Simper(), pairs((2, 1, 1, 2)))
    logprobs = torch.tensor([[9, 9, -1, -3], [9, 9, -1, 9], [9, 9, -1, 9], [9, 9, -2, -4]], dtype=F64)
    found = {name: row_metric(Simper(), batch, logprobs, name) for name in ("chosen_logprob", "rejected_logprob")}
    assert found == {"chosen_logprob": [-4.0, -1.0], "rejected_logprob": [-1.0, -6.0]}
    assert row_metric(Simper(), batch, logprobs, "chosen_logprob_per_token") == [-2.0, -1.0]
    assert row_metric(Simper(), batch, logprobs, "rejected_logprob_per_token") == [-1.0, -3.0]
    assert row_metric(Simper(), batch, logprobs, "accuracy") == [0.0, 1.0]
    assert row_metric(Simper(), batch, logprobs, "rejected_probability") == pytest.approx([math.exp(-1), math.exp(-3)])
    same = referenced(batch, torch.where(batch.loss_mask, -1.5, math.nan))
    assert row_metric(Dpo(), same, logprobs, "margin") == [-1.0 - 0.5, 0.5 + 3.0]
    assert row_metric(Dpo(), same, logprobs, "accuracy") == [0.0, 1.0]
    assert row_metric(Dpo(length_normalised=True), same, logprobs, "margin") == [-0.5 - 0.5, 0.5 + 1.5]


def test_the_metrics_of_groups_are_those_of_their_extremes() -> None:
    batch = batch_of(Grouper(), [group((0.5, 1.0, 0.0)), group((7.0, 3.0, 7.0), 1)])
    logprobs = torch.where(batch.loss_mask, -torch.arange(1.0, 7.0)[:, None], math.nan).to(F64)
    assert row_metric(Grouper(), batch, logprobs, "best_logprob_per_token") == [-2.0, -4.0, -6.0]
    assert row_metric(Grouper(), batch, logprobs, "worst_logprob_per_token") == [-3.0, -5.0]
    assert row_metric(Grouper(), batch, logprobs, "worst_probability") == pytest.approx([math.exp(-3), math.exp(-5)])


def test_what_an_algorithm_needs() -> None:
    assert Dpo().needs.reference_logprobs
    assert not Simper().needs.reference_logprobs
    assert not Grouper().needs.reference_logprobs
    assert [a.needs.data for a in (Dpo(), Simper(), Grouper())] == ["pairs", "pairs", "groups"]
    assert not any(a.needs.rollouts for a in (Dpo(), Simper(), Grouper()))
