from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses.correction import (
    geometric_mask,
    icepop,
    off_policy_sequence_mask,
    sequence_mask,
    tis_sequence,
    tis_token,
)

F64 = torch.float64
NAN, INF = math.nan, math.inf
Weights = Callable[[Tensor, Tensor, Tensor], Tensor]


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def row(*values: float) -> Tensor:
    return rows(list(values))


def everything(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool)


OF_A_ROW: dict[str, Weights] = {
    "tis_sequence": partial(tis_sequence, cap=2.0),
    "sequence_mask": partial(sequence_mask, cap=2.0),
    "geometric_mask": partial(geometric_mask, low=0.9, high=1.1),
    "off_policy_sequence_mask": lambda prox, other, mask: off_policy_sequence_mask(
        other, prox, -torch.ones(len(prox)), mask, delta=0.1
    ),
}
OF_A_TOKEN: dict[str, Weights] = {
    "icepop": lambda prox, roll, _: icepop(prox, roll, low=0.5, high=5.0),
    "tis_token": lambda prox, roll, _: tis_token(prox, roll, cap=2.0),
}
of_a_row = pytest.mark.parametrize("weights", OF_A_ROW.values(), ids=OF_A_ROW)
any_weights = pytest.mark.parametrize(
    "weights", [*OF_A_ROW.values(), *OF_A_TOKEN.values()], ids=[*OF_A_ROW, *OF_A_TOKEN]
)


# --- every correction -------------------------------------------------------------------------------------------------


@any_weights
def test_weights_carry_no_gradient(weights: Weights) -> None:
    first, second = row(-1.0, -2.0).requires_grad_(), row(-1.5, -2.0).requires_grad_()
    assert not weights(first, second, everything(first)).requires_grad


@any_weights
def test_equal_log_probs_weigh_exactly_one(weights: Weights) -> None:
    same = row(-0.3, -7.0, -1e-3)
    assert weights(same, same, everything(same)).tolist() == [[1.0, 1.0, 1.0]]


@any_weights
@pytest.mark.parametrize(("first", "second"), [(NAN, -1.0), (-1.0, NAN), (-INF, -INF)])
def test_a_broken_log_prob_does_not_pass_for_a_masked_token(weights: Weights, first: float, second: float) -> None:
    found = weights(row(first, -1.0), row(second, -1.0), everything(row(0, 0)))
    assert found[0, 0].isnan()


@of_a_row
@pytest.mark.parametrize("junk", [NAN, INF, -INF, -300.0])
def test_what_stands_off_the_mask_does_not_move_a_row(weights: Weights, junk: float) -> None:
    mask = torch.tensor([[0, 1, 1, 0]]).bool()
    clean = weights(row(0, -1.0, -1.2, 0), row(0, -1.3, -1.4, 0), mask)
    dirty = weights(row(junk, -1.0, -1.2, 0), row(0, -1.3, -1.4, junk), mask)
    assert torch.equal(clean, dirty)
    assert (clean[0] == clean[0, 1]).all()


@of_a_row
def test_a_row_without_masked_tokens_weighs_one(weights: Weights) -> None:
    mask = torch.tensor([[0, 0], [1, 1]]).bool()
    found = weights(rows([NAN, INF], [-1.0, -1.0]), rows([-1.0, NAN], [-1.0, -1.0]), mask)
    assert found.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("name", ["tis_sequence", "sequence_mask"])
@given(gap=st.floats(-3, 3))
def test_on_completions_of_one_token_the_sequence_is_the_token(name: str, gap: float) -> None:
    proximal, rollout = row(-1.0 + gap), row(-1.0)
    token = {
        "tis_sequence": tis_token(proximal, rollout, cap=2.0),
        "sequence_mask": icepop(proximal, rollout, low=0, high=2),
    }
    torch.testing.assert_close(OF_A_ROW[name](proximal, rollout, everything(proximal)), token[name], atol=1e-14, rtol=0)


@given(
    gaps=st.lists(st.tuples(st.floats(-0.5, 0.5), st.booleans()), min_size=1, max_size=6),
    advantage=st.floats(-1, 1),
)
def test_the_weights_of_a_row_agree_with_a_naive_loop(gaps: list[tuple[float, bool]], advantage: float) -> None:
    kept = [gap for gap, on in gaps if on]
    rho, mean = math.exp(sum(kept)), sum(kept) / max(len(kept), 1)
    proximal, rollout = row(*(gap for gap, _ in gaps)), torch.zeros(1, len(gaps), dtype=F64)
    mask = torch.tensor([[on for _, on in gaps]])
    given_advantage = torch.tensor([advantage], dtype=F64)
    found = [
        tis_sequence(proximal, rollout, mask, cap=1.25),
        sequence_mask(proximal, rollout, mask, cap=1.25),
        geometric_mask(proximal, rollout, mask, low=0.875, high=1.125),
        off_policy_sequence_mask(rollout, proximal, given_advantage, mask, delta=0.15),
    ]
    wanted = [
        min(rho, 1.25),
        rho * (rho <= 1.25),
        0.875 <= math.exp(mean) <= 1.125,
        not (advantage < 0 and mean > 0.15),
    ]
    near_an_edge = (
        min(abs(rho - 1.25), abs(math.exp(mean) - 0.875), abs(math.exp(mean) - 1.125), abs(mean - 0.15)) < 1e-9
    )
    if not near_an_edge:
        for weights, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(weights, torch.full_like(proximal, float(value)), atol=1e-10, rtol=0)


# --- token by token ---------------------------------------------------------------------------------------------------


def test_icepop_keeps_ratios_inside_its_band_and_masks_those_outside() -> None:
    # exp(log(.5)) can miss .5 by one bit, so the bounds are tested on ratios that float64 holds exactly.
    ratios = row(0.49, 0.5, 1.0, 5.0, 5.01)
    found = icepop(ratios.log(), row(0, 0, 0, 0, 0), low=0.5, high=float(ratios.log().exp()[0, 3]))
    torch.testing.assert_close(found, row(0, 0.5, 1, 5, 0), atol=1e-12, rtol=0)


def test_icepop_divides_learner_by_engine() -> None:
    found = icepop(row(-1.0), row(-1.5), low=0.5, high=5.0)
    assert found.item() == pytest.approx(math.exp(0.5), abs=1e-15)


def test_a_ratio_too_large_for_a_float_is_masked() -> None:
    huge = row(0.0), row(-2000.0)
    assert icepop(*huge, low=0.5, high=5.0).item() == 0.0
    assert sequence_mask(*huge, everything(huge[0]), cap=2.0).item() == 0.0
    assert geometric_mask(*huge, everything(huge[0]), low=0.9, high=1.1).item() == 0.0


def test_truncated_weights_by_hand() -> None:
    ratios = row(0.1, 1.0, 1.9, 2.1, 50.0)
    found = tis_token(ratios.log(), torch.zeros_like(ratios), cap=2.0)
    torch.testing.assert_close(found, row(0.1, 1.0, 1.9, 2.0, 2.0), atol=1e-14, rtol=0)
    assert tis_token(row(0.0), row(-2000.0), cap=2.0).item() == 2.0


# --- by the row -------------------------------------------------------------------------------------------------------


def test_sequence_weights_are_the_product_over_the_mask() -> None:
    ratios = rows([2.0, 0.5, 1.5, 9.0], [2.0, 2.0, 0.25, 9.0], [2.0, 1.5, 1.0, 9.0])
    mask = torch.tensor([[1, 1, 1, 0]] * 3).bool()
    capped = tis_sequence(ratios.log(), torch.zeros_like(ratios), mask, cap=2.0)
    torch.testing.assert_close(capped, rows([1.5] * 4, [1.0] * 4, [2.0] * 4), atol=1e-14, rtol=0)
    masked = sequence_mask(ratios.log(), torch.zeros_like(ratios), mask, cap=2.0)
    torch.testing.assert_close(masked, rows([1.5] * 4, [1.0] * 4, [0.0] * 4), atol=1e-14, rtol=0)


def test_the_geometric_mask_looks_at_the_mean_not_at_the_length() -> None:
    drift = torch.full((2, 1000), 5e-4, dtype=F64)
    drift[1] *= 3
    found = geometric_mask(drift, torch.zeros_like(drift), everything(drift), low=0.999, high=1.001)
    assert found[:, 0].tolist() == [1.0, 0.0]
    assert geometric_mask(-drift, torch.zeros_like(drift), everything(drift), low=0.999, high=1.001)[1, 0] == 0.0


def test_off_policy_rows_are_masked_only_where_they_are_to_be_pushed_down() -> None:
    proximal = torch.zeros(4, 2, dtype=F64)
    logprobs = rows([-0.3, -0.1], [-0.3, -0.1], [-0.05, -0.05], [0.3, 0.1])
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    found = off_policy_sequence_mask(logprobs, proximal, advantages, everything(proximal), delta=0.1)
    assert found.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]


def test_the_advantage_of_a_row_is_the_mean_over_its_mask_where_every_token_has_one() -> None:
    proximal, logprobs = torch.zeros(2, 3, dtype=F64), torch.full((2, 3), -1.0, dtype=F64)
    mask = torch.tensor([[0, 1, 1]] * 2).bool()
    advantages = rows([NAN, -3.0, 1.0], [-100.0, 3.0, -1.0])
    found = off_policy_sequence_mask(logprobs, proximal, advantages, mask, delta=0.1)
    assert found.tolist() == [[0.0] * 3, [1.0] * 3]


def test_a_broken_advantage_does_not_pass_for_a_kept_row() -> None:
    logprobs = row(-1.0)
    found = off_policy_sequence_mask(logprobs, logprobs, torch.tensor([NAN]), everything(logprobs), delta=0.1)
    assert found.isnan().all()
