from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses.policy import (
    cispo,
    clipped,
    clipped_sequence_surrogate,
    clipped_surrogate,
    reinforce,
    sequence_ratio,
    truncated_policy_gradient,
)
from rlhf.losses.sequence import masked_mean, masked_sum, reward_to_go, spread_over_tokens

F64 = torch.float64
NAN, INF = math.nan, math.inf
MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
"""Three tokens with a gap, a completion of one token, and an empty row."""


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=F64)


# --- clipped surrogate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: REINFORCE
        (1.1, 2.0, -2.2, -2.2),  # inside the band: -ratio * A
        (1.5, 2.0, -2.4, 0.0),  # too likely already: clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # less likely than it should be: never clipped
        (1.5, -2.0, 3.0, 3.0),  # more likely than it should be: never clipped
        (0.5, -2.0, 1.4, 0.0),  # unlikely enough: clipped at 0.7
        (0.8, -2.0, 1.6, 1.6),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprobs = row(math.log(ratio) - 0.3).requires_grad_()
    clip = {"clip_low": 0.3, "clip_high": 0.2}
    found = clipped_surrogate(logprobs, row(-0.3), torch.tensor([advantage], dtype=F64), **clip)
    found.sum().backward()
    assert logprobs.grad is not None
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)
    was_clipped = clipped(logprobs.detach(), row(-0.3), torch.tensor([advantage], dtype=F64), **clip)
    assert bool(was_clipped) == (gradient == 0.0 and advantage != 0.0)


def test_the_surrogate_sends_gradient_to_the_policy_alone() -> None:
    inputs = [row(-0.5, -0.7).requires_grad_(), row(-0.6, -0.6).requires_grad_()]
    advantages = torch.tensor([1.5], dtype=F64, requires_grad=True)
    clipped_surrogate(*inputs, advantages, clip_low=0.2, clip_high=0.2).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is None
    assert advantages.grad is None


def test_an_advantage_can_be_given_for_each_token() -> None:
    logprobs = row(-1.0, -2.0)
    found = clipped_surrogate(logprobs, logprobs, row(1.0, -3.0), clip_low=0.2, clip_high=0.2)
    assert found.tolist() == [[-1.0, 3.0]]


# --- sums over a row --------------------------------------------------------------------------------------------------


def soiled(values: Tensor) -> Tensor:
    """The same on the mask, and what no arithmetic survives off it."""
    junk = torch.tensor([NAN, INF, -INF, NAN, INF], dtype=F64).expand_as(values)
    return torch.where(MASK, values, junk)


def test_sums_and_means_of_a_row_by_hand() -> None:
    values = soiled(torch.arange(1, 16, dtype=F64).reshape(3, 5))
    assert masked_sum(values, MASK).tolist() == [2 + 3 + 5, 6, 0]
    assert masked_mean(values, MASK).tolist() == [10 / 3, 6, 0]
    assert reward_to_go(values, MASK).tolist() == [[0, 10, 8, 0, 5], [6, 0, 0, 0, 0], [0] * 5]
    per_row = torch.tensor([6.0, 5.0, NAN], dtype=F64)
    assert spread_over_tokens(per_row, MASK).tolist() == [[0, 2, 2, 0, 2], [5, 0, 0, 0, 0], [0] * 5]


@given(
    table=st.lists(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=5)
)
def test_sums_over_a_row_agree_with_naive_loops(table: list[list[tuple[float, bool]]]) -> None:
    values = torch.tensor([[v for v, _ in line] for line in table], dtype=F64)
    mask = torch.tensor([[on for _, on in line] for line in table])
    sums = [math.fsum(v for v, on in line if on) for line in table]
    counts = [max(sum(on for _, on in line), 1) for line in table]
    ahead = [[math.fsum(v for v, on in line[t:] if on) if line[t][1] else 0.0 for t in range(4)] for line in table]
    spread = [[s / n if on else 0.0 for _, on in line] for line, s, n in zip(table, sums, counts, strict=True)]
    means = [s / n for s, n in zip(sums, counts, strict=True)]
    found = [masked_sum(values, mask), masked_mean(values, mask), reward_to_go(values, mask)]
    found.append(spread_over_tokens(found[0], mask))
    for got, wanted in zip(found, (sums, means, ahead, spread), strict=True):
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=F64), atol=1e-10, rtol=0)


def test_a_row_sums_to_its_value_again_after_spreading() -> None:
    found = masked_sum(spread_over_tokens(torch.tensor([0.7, -2.0, 5.0], dtype=F64), MASK), MASK)
    torch.testing.assert_close(found, torch.tensor([0.7, -2.0, 0.0], dtype=F64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, reward_to_go])
def test_off_the_mask_nothing_reaches_a_gradient_and_on_it_a_broken_value_stays(reduce: object) -> None:
    assert callable(reduce)
    values = soiled(torch.ones(3, 5, dtype=F64)).requires_grad_()
    reduce(values, MASK).sum().backward()
    assert values.grad is not None
    assert values.grad[~MASK].abs().sum() == 0
    assert (values.grad[MASK] > 0).all()
    broken = torch.ones(3, 5).index_put((torch.tensor(0), torch.tensor(4)), torch.tensor(NAN))
    assert reduce(broken, MASK)[0].isnan().any()
    assert reduce(broken, MASK)[1:].isfinite().all()


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, reward_to_go], ids=lambda f: f.__name__)
def test_sums_over_a_row_have_the_gradient_of_finite_differences(reduce: object) -> None:
    assert callable(reduce)
    values = torch.randn(3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: reduce(v, MASK), values)
    assert torch.autograd.gradcheck(lambda v: spread_over_tokens(v, MASK), values[:, 0].detach().requires_grad_())


# --- ratio and loss of a sequence -------------------------------------------------------------------------------------


def test_the_ratio_of_a_sequence_by_hand() -> None:
    gaps = torch.tensor([[9, 0.1, 0.2, 9, 0.6], [0.4, 9, 9, 9, 9], [9, 9, 9, 9, 9]], dtype=F64)
    product = sequence_ratio(soiled(gaps - 1), soiled(torch.zeros_like(gaps)) - 1, MASK, mean=False)
    torch.testing.assert_close(product, torch.tensor([0.9, 0.4, 0.0], dtype=F64).exp(), atol=1e-14, rtol=0)
    geometric = sequence_ratio(soiled(gaps - 1), soiled(torch.zeros_like(gaps)) - 1, MASK, mean=True)
    torch.testing.assert_close(geometric, torch.tensor([0.3, 0.4, 0.0], dtype=F64).exp(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("mean", [False, True])
def test_the_ratio_of_a_sequence_has_the_gradient_of_finite_differences(mean: bool) -> None:
    logprobs, proximal = torch.randn(3, 5, dtype=F64, requires_grad=True), torch.randn(3, 5, dtype=F64)
    assert torch.autograd.gradcheck(lambda lp: sequence_ratio(lp, proximal, MASK, mean=mean), logprobs)


@pytest.mark.parametrize("mean", [False, True])
def test_the_loss_of_a_sequence_is_finite_whatever_stands_off_the_mask(mean: bool) -> None:
    logprobs = soiled(torch.full((3, 5), -1.0, dtype=F64)).requires_grad_()
    proximal = soiled(torch.full((3, 5), -1.1, dtype=F64))
    ratio = sequence_ratio(logprobs, proximal, MASK, mean=mean)
    loss = clipped_sequence_surrogate(ratio, torch.tensor([1.0, -1.0, 1.0], dtype=F64), clip_low=0.5, clip_high=0.5)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad[~MASK].abs().sum() == 0
    assert logprobs.grad[MASK].isfinite().all()


@pytest.mark.parametrize("ratio", [0.3, 0.7, 1.0, 1.1, 1.3, 4.0])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_a_sequence_is_clipped_as_a_token_is(ratio: float, advantage: float) -> None:
    logprobs, weight = row(math.log(ratio)).requires_grad_(), torch.tensor([advantage], dtype=F64)
    token = clipped_surrogate(logprobs, row(0.0), weight, clip_low=0.25, clip_high=0.2)
    sequence = clipped_sequence_surrogate(
        sequence_ratio(logprobs, row(0.0), row(1.0).bool(), mean=False), weight, clip_low=0.25, clip_high=0.2
    )
    assert sequence.tolist() == token[0].tolist()
    assert torch.autograd.grad(sequence.sum(), logprobs)[0] == torch.autograd.grad(token.sum(), logprobs)[0]


def test_the_gradient_of_gspo_at_ratio_1_is_that_of_reinforce_over_the_length() -> None:
    logprobs = torch.full((3, 5), -1.0, dtype=F64, requires_grad=True)
    ratio = sequence_ratio(logprobs, logprobs.detach(), MASK, mean=True)
    advantages = torch.tensor([3.0, -2.0, 7.0], dtype=F64)
    clipped_sequence_surrogate(ratio, advantages, clip_low=3e-4, clip_high=4e-4).sum().backward()
    torch.testing.assert_close(logprobs.grad, -spread_over_tokens(advantages, MASK), atol=1e-15, rtol=0)


def test_a_clipped_token_with_a_ratio_beyond_all_floats_has_no_gradient_rather_than_a_broken_one() -> None:
    logprobs = torch.zeros(1, 2, requires_grad=True)
    far, weight, clip = torch.tensor([[-900.0, 0.0]]), torch.tensor([1.0]), {"clip_low": 0.2, "clip_high": 0.2}
    token = clipped_surrogate(logprobs, far, weight, **clip).sum()
    ratio = sequence_ratio(logprobs, far, torch.ones(1, 2).bool(), mean=False)
    assert torch.autograd.grad(token, logprobs)[0].tolist() == [[0.0, -1.0]]
    assert torch.autograd.grad(clipped_sequence_surrogate(ratio, weight, **clip).sum(), logprobs)[0].tolist() == [
        [0, 0]
    ]


# --- REINFORCE and its weighted forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("advantages", [torch.tensor([2.0], dtype=F64), row(2.0, 2.0, 2.0)], ids=["row", "token"])
def test_policy_gradient_losses_by_hand(advantages: Tensor) -> None:
    old, ratios = row(-1.0, -1.5, -2.0), row(0.5, 1.0, 3.0)
    logprobs = old + ratios.log()
    torch.testing.assert_close(reinforce(logprobs, advantages), -2 * logprobs, atol=1e-14, rtol=0)
    cut = cispo(logprobs, old, advantages, ratio_high=0.28)
    torch.testing.assert_close(cut, -2 * row(0.5, 1.0, 1.28) * logprobs, atol=1e-14, rtol=0)
    truncated = truncated_policy_gradient(logprobs, old, advantages, cap=2.0)
    torch.testing.assert_close(truncated, -2 * row(0.5, 1.0, 2.0) * logprobs, atol=1e-14, rtol=0)


@given(gaps=st.lists(st.floats(-2, 2), min_size=1, max_size=5), advantage=st.floats(-3, 3))
def test_the_gradient_is_the_detached_weight_times_reinforce(gaps: list[float], advantage: float) -> None:
    old, weight = torch.full((1, len(gaps)), -3.0, dtype=F64), torch.tensor([advantage], dtype=F64)
    logprobs = (old + row(*gaps)).requires_grad_()
    losses = {
        1.28: cispo(logprobs, old, weight, ratio_high=0.28),
        5.0: truncated_policy_gradient(logprobs, old, weight, cap=5.0),
    }
    for cap, loss in losses.items():
        wanted = row(*(-min(math.exp(gap), cap) * advantage for gap in gaps))
        found = torch.autograd.grad(loss.sum(), logprobs)[0]
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
        torch.testing.assert_close(loss.detach(), wanted * logprobs.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("ratio", [0.6, 1.1, 1.9])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_policy_losses_have_the_gradient_of_finite_differences(ratio: float, advantage: float) -> None:
    logprobs, weight = row(math.log(ratio), -0.7).requires_grad_(), torch.tensor([advantage], dtype=F64)
    old = row(0.0, -0.75)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda lp: clipped_surrogate(lp, old, weight, clip_low=0.2, clip_high=0.3), logprobs)
    assert gradcheck(lambda lp: reinforce(lp, weight), logprobs)
    ratios = torch.tensor([ratio], dtype=F64, requires_grad=True)
    assert gradcheck(lambda r: clipped_sequence_surrogate(r, weight, clip_low=0.2, clip_high=0.3), ratios)


@pytest.mark.parametrize(
    "loss",
    [
        lambda lp, old, a: reinforce(lp, a),
        lambda lp, old, a: cispo(lp, old, a, ratio_high=0.2),
        lambda lp, old, a: truncated_policy_gradient(lp, old, a, cap=2.0),
        lambda lp, old, a: clipped_sequence_surrogate(
            sequence_ratio(lp, old, torch.ones(1, 2).bool(), mean=True), a, clip_low=0.2, clip_high=0.2
        ),
    ],
    ids=["reinforce", "cispo", "truncated", "sequence"],
)
def test_policy_losses_send_gradient_to_the_policy_alone(loss: object) -> None:
    assert callable(loss)
    logprobs, old = row(-0.5, -0.7).requires_grad_(), row(-0.55, -0.72).requires_grad_()
    advantages = torch.tensor([1.5], dtype=F64, requires_grad=True)
    loss(logprobs, old, advantages).sum().backward()
    assert logprobs.grad is not None
    assert (logprobs.grad < 0).all()
    assert old.grad is None
    assert advantages.grad is None
