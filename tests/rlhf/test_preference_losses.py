from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from rlhf.losses.preference import (
    dpo,
    ipo,
    pair_margin,
    probability_loss,
    sequence_logprob,
    sequence_probability,
    spread_over_pairs,
)
from rlhf.losses.reduce import sample_weights

F64 = torch.float64
MASK = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 0, 1]]).bool()


def values(seed: int = 0) -> Tensor:
    """Log-probs [4, 4] with NaN off the mask."""
    noise = torch.rand(4, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return (-noise).masked_fill(~MASK, math.nan)


def test_the_probability_of_a_completion_is_the_geometric_mean_of_its_tokens() -> None:
    logprobs = torch.tensor([[0.0, 0.5, 0.125], [0.0, 0.25, 1.0]]).log()
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()
    torch.testing.assert_close(sequence_probability(logprobs, mask), torch.tensor([0.25, 0.25]))


def test_half_precision_is_widened_before_anything_is_summed() -> None:
    logprobs = torch.full((1, 5000), -1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 5000, dtype=torch.bool)
    assert sequence_logprob(logprobs, mask, mean=False).tolist() == [-5000.0]
    assert sequence_probability(logprobs, mask).dtype == torch.float32
    assert sequence_probability(values(), MASK).dtype == F64


def test_an_empty_completion_has_probability_one_and_no_gradient() -> None:
    logprobs = torch.full((2, 3), math.nan, dtype=F64, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert sequence_probability(logprobs, mask).tolist() == [1.0, 1.0]
    margin = pair_margin(logprobs, logprobs, mask, mean=True)
    assert margin.tolist() == [0.0]
    (dpo(margin, beta=0.1).sum() + sequence_probability(logprobs, mask).sum()).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().sum() == 0


def test_a_completion_of_one_token_has_that_tokens_probability() -> None:
    logprobs = torch.tensor([[0.0, 0.3, 0.9]], dtype=F64).log()
    assert sequence_probability(logprobs, torch.tensor([[False, True, False]])).item() == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize(("mean", "expected"), [(False, [0.5, 1.0]), (True, [0.375, 0.5])])
def test_the_margin_of_pairs_by_hand(mean: bool, expected: list[float]) -> None:
    policy = torch.tensor([[0, -1.0, -2.0, 0], [0, 0, -1.0, 0], [0, -1.0, -1.0, -1.0], [0, -2.0, 0, -2.0]])
    reference = torch.tensor([[0, -1.5, -1.75, 0], [0, 0, -0.75, 0], [0, -1.0, -1.0, -1.0], [0, -1.0, 0, -2.0]])
    # log-ratios summed: 0.25 and -0.25, 0 and -1; averaged: 0.125 and -0.25, 0 and -0.5
    torch.testing.assert_close(pair_margin(policy, reference, MASK, mean=mean), torch.tensor(expected))


def test_dpo_at_margin_zero_is_log_two_for_any_label_smoothing() -> None:
    for smoothing in (0.0, 0.1, 0.4):
        loss = dpo(torch.zeros(1, dtype=F64), beta=0.1, label_smoothing=smoothing)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-15)


def test_dpo_by_hand() -> None:
    margin = torch.tensor([2.0, -2.0], dtype=F64)
    good, bad = -math.log(1 / (1 + math.exp(-1))), -math.log(1 / (1 + math.exp(1)))
    assert dpo(margin, beta=0.5).tolist() == pytest.approx([good, bad], abs=1e-15)
    smoothed = [0.9 * good + 0.1 * bad, 0.9 * bad + 0.1 * good]
    assert dpo(margin, beta=0.5, label_smoothing=0.1).tolist() == pytest.approx(smoothed, abs=1e-15)


def test_dpo_is_finite_at_margins_where_the_sigmoid_is_zero() -> None:
    margin = torch.tensor([1e6, -1e6], requires_grad=True)
    loss = dpo(margin, beta=1.0)
    assert loss.tolist() == [0.0, 1e6]
    loss.sum().backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == [0.0, -1.0]


def test_label_smoothing_has_its_minimum_where_the_sigmoid_is_one_less_it() -> None:
    margin = torch.tensor([math.log(0.8 / 0.2)], dtype=F64, requires_grad=True)
    dpo(margin, beta=1.0, label_smoothing=0.2).sum().backward()
    assert margin.grad is not None
    assert abs(margin.grad.item()) < 1e-15


def test_ipo_is_zero_at_half_the_inverse_of_beta() -> None:
    margin = torch.tensor([5.0, 0.0], dtype=F64)
    assert ipo(margin, beta=0.1).tolist() == [0.0, 25.0]


def test_gradients_agree_with_finite_differences_through_values_that_are_nan_off_the_mask() -> None:
    mask, reference = MASK, values(1)
    inside = values().nan_to_num()[mask].requires_grad_()

    def full(on_mask: Tensor) -> Tensor:
        return torch.full((4, 4), math.nan, dtype=F64).masked_scatter(mask, on_mask)

    def margin(on_mask: Tensor, mean: bool) -> Tensor:
        return pair_margin(full(on_mask), reference, mask, mean=mean)

    advantages = torch.tensor([1.0, -1.0, 0.5, -0.2], dtype=F64)
    assert gradcheck(lambda x: dpo(margin(x, False), beta=0.7, label_smoothing=0.1), (inside,))
    assert gradcheck(lambda x: ipo(margin(x, True), beta=0.7), (inside,))
    assert gradcheck(lambda x: probability_loss(full(x), advantages, mask), (inside,))


def test_gradient_reaches_the_policy_alone() -> None:
    policy, reference = (v.nan_to_num().requires_grad_() for v in (values(), values(1)))
    advantages = torch.ones(4, dtype=F64, requires_grad=True)
    loss = pair_margin(policy, reference, MASK, mean=False).sum() + probability_loss(policy, advantages, MASK).sum()
    loss.backward()
    assert policy.grad is not None
    assert policy.grad[MASK].abs().min() > 0
    assert policy.grad[~MASK].abs().sum() == 0
    assert reference.grad is None
    assert advantages.grad is None


def test_half_the_loss_of_pairs_is_the_mean_of_advantages_one_and_minus_one() -> None:
    probability = sequence_probability(values(), MASK)
    pairs = (-probability[0::2] + probability[1::2]).mean()
    rows = probability_loss(values(), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64), MASK).mean()
    assert rows.item() == pytest.approx(pairs.item() / 2, abs=1e-16)


@pytest.mark.parametrize("empty", [[], [0], [1], [0, 3]])
def test_the_reduction_of_a_spread_pair_value_is_the_mean_over_pairs(empty: list[int]) -> None:
    mask = MASK.clone()
    mask[empty] = False
    spread = spread_over_pairs(torch.tensor([3.0, 5.0], dtype=F64), mask)
    weights = sample_weights(mask.sum(-1), "sequence_sum", dtype=F64)
    assert (spread * mask * weights[:, None]).sum().item() == pytest.approx(4.0, abs=1e-15)
    assert spread[~mask].abs().sum() == 0
