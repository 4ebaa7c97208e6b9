from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses.reduce import Reduction, sample_weights

TOKENS = torch.tensor([3, 1])
REDUCTIONS: list[Reduction] = ["sequence_sum", "sequence_mean", "token_mean", "fixed_length"]


def weights(reduction: Reduction, tokens: Tensor = TOKENS) -> Tensor:
    length = 10 if reduction == "fixed_length" else None
    return sample_weights(tokens, reduction, fixed_length=length, dtype=torch.float64)


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
    expected = torch.tensor([first, second], dtype=torch.float64)
    torch.testing.assert_close(weights(reduction), expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("reduction", "total"), [("sequence_sum", 2.0), ("sequence_mean", 1.0), ("token_mean", 1.0), ("fixed_length", 0.2)]
)
def test_the_weights_of_all_tokens_add_up_to_what_the_reduction_says(reduction: Reduction, total: float) -> None:
    assert (weights(reduction) * TOKENS).sum().item() == pytest.approx(total, abs=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_sample_without_trained_tokens_counts_as_a_sequence(reduction: Reduction) -> None:
    found = weights(reduction, torch.tensor([3, 1, 0, 0]))
    # Half of the samples are empty: means over sequences halve, the mean over tokens does not.
    factor = 1.0 if reduction == "token_mean" else 0.5
    torch.testing.assert_close(found[:2], weights(reduction) * factor, atol=1e-15, rtol=0)


@given(counts=st.lists(st.integers(0, 9), max_size=6))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_agree_with_a_plain_loop_and_are_finite_without_any_token(
    reduction: Reduction, counts: list[int]
) -> None:
    expected = {
        "sequence_sum": [1 / len(counts) for _ in counts],
        "sequence_mean": [1 / (len(counts) * max(count, 1)) for count in counts],
        "token_mean": [1 / max(sum(counts), 1) for _ in counts],
        "fixed_length": [1 / (len(counts) * 10) for _ in counts],
    }[reduction]
    found = weights(reduction, torch.tensor(counts, dtype=torch.int64))
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_order_of_samples_does_not_matter(reduction: Reduction, counts: list[int]) -> None:
    tokens = torch.tensor(counts)
    assert torch.equal(weights(reduction, tokens.flip(0)), weights(reduction, tokens).flip(0))


def test_fixed_length_without_its_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the constant length C"):
        sample_weights(TOKENS, "fixed_length")


def test_weights_are_float32_unless_asked_otherwise() -> None:
    assert sample_weights(TOKENS, "token_mean").dtype == torch.float32
