from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.losses.reduce import Reduction, token_weights

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]).bool()
REDUCTIONS: list[Reduction] = ["sequence_sum", "sequence_mean", "token_mean", "fixed_length"]


def weights(reduction: Reduction, mask: torch.Tensor = MASK) -> torch.Tensor:
    length = 10 if reduction == "fixed_length" else None
    return token_weights(mask, reduction, fixed_length=length, dtype=torch.float64)


@pytest.mark.parametrize(
    ("reduction", "first", "second"),
    [
        ("sequence_sum", 1 / 2, 1 / 2),
        ("sequence_mean", 1 / 2 / 3, 1 / 2),
        ("token_mean", 1 / 4, 1 / 4),
        ("fixed_length", 1 / 20, 1 / 20),
    ],
)
def test_the_weight_of_a_token_by_hand(reduction: Reduction, first: float, second: float) -> None:
    expected = torch.tensor([[0, first, first, first], [0, 0, 0, second]], dtype=torch.float64)
    torch.testing.assert_close(weights(reduction), expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("reduction", "total"), [("sequence_sum", 2.0), ("sequence_mean", 1.0), ("token_mean", 1.0), ("fixed_length", 0.2)]
)
def test_all_weights_of_a_step_add_up_to_what_the_reduction_says(reduction: Reduction, total: float) -> None:
    assert weights(reduction).sum().item() == pytest.approx(total, abs=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_without_masked_tokens_counts_as_a_sequence_and_weighs_nothing(reduction: Reduction) -> None:
    mask = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.bool)])
    found = weights(reduction, mask)
    assert found[2:].abs().sum() == 0
    # Half of the rows are empty: means over sequences halve, the mean over tokens does not.
    factor = 1.0 if reduction == "token_mean" else 0.5
    torch.testing.assert_close(found[:2], weights(reduction) * factor, atol=1e-15, rtol=0)


@given(bits=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6), extra=st.integers(0, 4))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_are_finite_zero_off_the_mask_and_blind_to_padding(
    reduction: Reduction, bits: list[list[bool]], extra: int
) -> None:
    mask = torch.tensor(bits)
    found = weights(reduction, mask)
    assert found.isfinite().all()
    assert found[~mask].abs().sum() == 0
    padded = weights(reduction, torch.nn.functional.pad(mask, (0, extra)))
    assert torch.equal(padded[:, :5], found)
    assert padded[:, 5:].abs().sum() == 0


def test_fixed_length_without_its_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the constant length C"):
        token_weights(MASK, "fixed_length")


def test_weights_are_float32_unless_asked_otherwise() -> None:
    assert token_weights(MASK, "token_mean").dtype == torch.float32
