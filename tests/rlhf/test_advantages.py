from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.advantages import group_mean_centred

rewards_of_a_group = st.lists(st.floats(-10, 10), min_size=1, max_size=9)


def test_an_advantage_is_the_reward_minus_the_mean_of_its_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, 1.0])
    found = group_mean_centred(rewards, torch.tensor([0, 0, 0, 0, 1, 1]))
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25, -0.25, 0.25]


def test_scaling_divides_by_the_population_standard_deviation_plus_eps() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = group_mean_centred(rewards, torch.zeros(4, dtype=torch.int64), scale_by_std=True, eps=1e-6)
    std = math.sqrt(3) / 4
    assert found.tolist() == pytest.approx([0.75 / (std + 1e-6)] + [-0.25 / (std + 1e-6)] * 3, abs=1e-14)


@pytest.mark.parametrize("scale_by_std", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.3, 1e-8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 11])
def test_identical_rewards_give_exactly_zero_advantage(value: float, size: int, scale_by_std: bool) -> None:
    found = group_mean_centred(torch.full((size,), value), torch.full((size,), 5), scale_by_std=scale_by_std)
    assert found.tolist() == [0.0] * size


@given(groups=st.lists(rewards_of_a_group, min_size=1, max_size=5), shift=st.floats(-5, 5))
def test_advantages_sum_to_zero_in_each_group_and_ignore_a_shift_of_all_rewards(
    groups: list[list[float]], shift: float
) -> None:
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    index = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    found = group_mean_centred(rewards, index)
    sums = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, index, found)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)
    torch.testing.assert_close(group_mean_centred(rewards + shift, index), found, atol=1e-12, rtol=0)


@given(order=st.permutations(range(8)))
def test_neither_row_order_nor_group_numbers_matter(order: list[int]) -> None:
    rewards = torch.tensor([0.0, 1, 0.25, 0.5, 1, 1, 0, 0], dtype=torch.float64)
    index = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    found = group_mean_centred(rewards[order], 100 - 7 * index[order])
    torch.testing.assert_close(found, group_mean_centred(rewards, index)[order], atol=1e-15, rtol=0)


def test_advantages_carry_no_gradient() -> None:
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not group_mean_centred(rewards, torch.tensor([0, 0])).requires_grad


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards \(2,\) and group_index \(3,\)"):
        group_mean_centred(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
