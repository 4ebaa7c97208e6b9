from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.advantages import (
    agapo_advantages,
    global_zscore,
    group_mean_centred,
    group_min_max,
    group_zscore,
    leave_one_out,
    soft_overlong_penalty,
)

F64 = torch.float64
OF_A_GROUP: list[Callable[[Tensor, Tensor], Tensor]] = [group_mean_centred, group_zscore, leave_one_out, group_min_max]
of_a_group = pytest.mark.parametrize("advantages", OF_A_GROUP, ids=lambda f: f.__name__)
rewards_of_a_group = st.lists(st.floats(-10, 10), min_size=1, max_size=9)
batches = st.lists(rewards_of_a_group, min_size=1, max_size=5)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


def one_group(rewards: Tensor) -> Tensor:
    return torch.zeros_like(rewards, dtype=torch.int64)


def flat(groups: list[list[float]]) -> tuple[Tensor, Tensor]:
    index = [i for i, group in enumerate(groups) for _ in group]
    return values(*(r for group in groups for r in group)), torch.tensor(index)


# --- every baseline of a group ----------------------------------------------------------------------------------------


def naive_std(numbers: list[float], ddof: int) -> float:
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / max(len(numbers) - ddof, 1))


def naive(name: str, group: list[float], i: int) -> float:
    if min(group) == max(group):
        return 0.0
    others, mean = group[:i] + group[i + 1 :], math.fsum(group) / len(group)
    return {
        "group_mean_centred": lambda: group[i] - mean,
        "group_zscore": lambda: (group[i] - mean) / (naive_std(group, 0) + 1e-6),
        "leave_one_out": lambda: group[i] - math.fsum(others) / len(others),
        "group_min_max": lambda: 2 * (group[i] - min(group)) / (max(group) - min(group)) - 1,
    }[name]()


@of_a_group
@given(groups=batches)
def test_advantages_agree_with_a_naive_loop(
    advantages: Callable[[Tensor, Tensor], Tensor], groups: list[list[float]]
) -> None:
    wanted = [naive(advantages.__name__, group, i) for group in groups for i in range(len(group))]
    torch.testing.assert_close(advantages(*flat(groups)), values(*wanted), atol=1e-10, rtol=0)


@of_a_group
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.3, 1e-8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_identical_rewards_give_exactly_zero_advantage(
    advantages: Callable[[Tensor, Tensor], Tensor], value: float, size: int, dtype: torch.dtype
) -> None:
    rewards = torch.full((size + 2,), value, dtype=dtype)
    rewards[-1] += 1
    found = advantages(rewards, torch.tensor([5] * size + [9, 9]))
    assert found[:size].tolist() == [0.0] * size
    assert found[-1] > 0


@of_a_group
def test_a_group_that_lost_members_is_a_smaller_group(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    rewards, index = values(1, 0, 0.5, 0, 1, 0.25, 1), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    kept = torch.tensor([0, 2, 3, 5, 6])
    found = advantages(rewards[kept], index[kept])
    alone = [advantages(rewards[rows], index[rows]) for rows in (torch.tensor([0, 2, 3]), torch.tensor([5]))]
    torch.testing.assert_close(found, torch.cat([*alone, values(0)]), atol=1e-15, rtol=0)


@of_a_group
@given(order=st.permutations(range(8)))
def test_neither_row_order_nor_group_numbers_matter(
    advantages: Callable[[Tensor, Tensor], Tensor], order: list[int]
) -> None:
    rewards, index = values(0, 1, 0.25, 0.5, 1, 1, 0, 0), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    found = advantages(rewards[order], 100 - 7 * index[order])
    torch.testing.assert_close(found, advantages(rewards, index)[order], atol=1e-14, rtol=0)


@of_a_group
def test_a_broken_reward_spoils_its_own_group_alone(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = advantages(values(1, math.nan, 1, 0), torch.tensor([0, 0, 1, 1]))
    assert found.isnan().tolist() == [True, True, False, False]


@of_a_group
def test_advantages_carry_no_gradient(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert not advantages(values(1, 0).requires_grad_(), torch.tensor([0, 0])).requires_grad


@of_a_group
def test_no_samples_have_no_advantages(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@of_a_group
def test_shapes_that_do_not_match_are_refused(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"rewards \(2,\) and group_index \(3,\)"):
        advantages(torch.zeros(2), torch.zeros(3, dtype=torch.int64))


# --- one by one -------------------------------------------------------------------------------------------------------


def test_a_centred_advantage_is_the_reward_minus_the_mean_of_its_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, 1.0])
    found = group_mean_centred(rewards, torch.tensor([0, 0, 0, 0, 1, 1]))
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25, -0.25, 0.25]


@given(groups=batches, shift=st.floats(-5, 5))
def test_centred_advantages_sum_to_zero_in_each_group_and_ignore_a_shift_of_all_rewards(
    groups: list[list[float]], shift: float
) -> None:
    rewards, index = flat(groups)
    found = group_mean_centred(rewards, index)
    sums = torch.zeros(len(groups), dtype=F64).index_add_(0, index, found)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)
    torch.testing.assert_close(group_mean_centred(rewards + shift, index), found, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("ddof", "std"), [(0, math.sqrt(3) / 4), (1, 0.5)])
@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-6, 1e-4])
def test_ddof_and_eps_of_the_z_score_are_the_ones_given(ddof: int, std: float, eps: float) -> None:
    rewards = values(1, 0, 0, 0)
    wanted = [0.75 / (std + eps)] + [-0.25 / (std + eps)] * 3
    assert group_zscore(rewards, one_group(rewards), eps=eps, ddof=ddof).tolist() == pytest.approx(wanted, abs=1e-14)
    assert global_zscore(rewards, eps=eps, ddof=ddof).tolist() == pytest.approx(wanted, abs=1e-14)


def test_the_z_score_takes_the_population_deviation_and_an_eps_of_a_millionth_by_default() -> None:
    rewards = values(1, 0, 0, 0)
    assert group_zscore(rewards, one_group(rewards))[0].item() == pytest.approx(0.75 / (math.sqrt(3) / 4 + 1e-6))
    assert torch.equal(global_zscore(rewards), group_zscore(rewards, one_group(rewards)))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("ddof", [0, 1])
def test_no_deviation_gives_zero_whatever_eps_and_ddof(eps: float, ddof: int) -> None:
    found = group_zscore(values(0.1, 0.1, 0.1, 3), torch.tensor([0, 0, 0, 1]), eps=eps, ddof=ddof)
    assert found.tolist() == [0.0] * 4


@given(
    rewards=st.lists(st.integers(-20, 20), min_size=2, max_size=9).filter(lambda r: min(r) < max(r)),
    scale=st.floats(0.1, 10),
    shift=st.floats(-10, 10),
)
@pytest.mark.parametrize("of_a_batch", [group_min_max, lambda r, g: group_zscore(r, g, eps=0.0)], ids=["minmax", "z"])
def test_a_z_score_and_a_min_max_ignore_shift_and_scale(
    of_a_batch: Callable[[Tensor, Tensor], Tensor], rewards: list[int], scale: float, shift: float
) -> None:
    raw = values(*rewards)
    moved = of_a_batch(scale * raw + shift, one_group(raw))
    torch.testing.assert_close(moved, of_a_batch(raw, one_group(raw)), atol=1e-10, rtol=0)


@given(groups=st.lists(st.lists(st.floats(-10, 10), min_size=2, max_size=9), min_size=1, max_size=5))
def test_leave_one_out_is_mean_centring_times_g_over_g_minus_1(groups: list[list[float]]) -> None:
    rewards, index = flat(groups)
    factor = values(*(len(g) / (len(g) - 1) for g in groups))[index]
    torch.testing.assert_close(
        leave_one_out(rewards, index), factor * group_mean_centred(rewards, index), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    ("rewards", "wanted"), [([1, 0, 0, 0], [1, -1, -1, -1]), ([0.9, 0.5, 0.1, 0.3], [1, 0, -1, -0.5])]
)
def test_grouper_advantages_by_hand(rewards: list[float], wanted: list[float]) -> None:
    raw = values(*rewards)
    found = group_min_max(raw, one_group(raw))
    assert found.tolist() == pytest.approx(wanted, abs=1e-15)
    # The paper's z-score beforehand changes nothing.
    assert group_min_max(group_zscore(raw, one_group(raw)), one_group(raw)).tolist() == pytest.approx(wanted, abs=1e-15)


@given(group=st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9).filter(lambda g: max(g) - min(g) > 1e-6))
def test_the_best_and_the_worst_of_a_group_have_exactly_1_and_minus_1(group: list[float]) -> None:
    rewards = torch.tensor(group)
    found = group_min_max(rewards, one_group(rewards))
    assert found[rewards.argmax()] == 1.0
    assert found[rewards.argmin()] == -1.0


def test_a_global_z_score_has_mean_zero_and_deviation_one() -> None:
    found = global_zscore(values(3, 1, 4, 1, 5, 9, 2, 6), eps=0.0)
    assert found.mean().item() == pytest.approx(0, abs=1e-15)
    assert found.std(correction=0).item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("size", [1, 3, 7, 11])
def test_a_global_z_score_of_equal_values_is_exactly_zero(size: int) -> None:
    assert global_zscore(torch.full((size,), 0.1), eps=0.0).tolist() == [0.0] * size


# --- AGAPO ------------------------------------------------------------------------------------------------------------

GOLDEN = values(1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0)
GROUPS = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
LOO_STD = math.sqrt((12 / 9 + 16 / 9) / 12)
"""Of leave-one-out [1, -1/3 x 3 | 0 x 4 | 2/3 x 2, -2/3 x 2]: 0.5091751."""


def test_agapo_by_hand() -> None:
    assert pytest.approx(0.5091751, abs=1e-7) == LOO_STD
    found = agapo_advantages(GOLDEN, GROUPS, GOLDEN > 0)
    scale = 1 / (LOO_STD + 1e-6)
    wanted = [scale, *[-scale / 3] * 3, 0, 0, 0, 0, *[scale * 2 / 3] * 2, *[-scale * 2 / 3] * 2]
    assert found.tolist() == pytest.approx(wanted, abs=1e-14)
    rounded = [1.9640, *[-0.6547] * 3, 0, 0, 0, 0, *[1.3093] * 2, *[-1.3093] * 2]
    assert found.tolist() == pytest.approx(rounded, abs=5e-5)


@given(rewards=st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8))
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_literal_agapo_gives_unsolved_groups_of_equal_rewards_exactly_zero(
    dtype: torch.dtype, rewards: list[float]
) -> None:
    raw = torch.tensor([0.1] * 3 + rewards, dtype=dtype)
    found = agapo_advantages(raw, torch.tensor([0] * 3 + [1] * 4 + [2] * 4), raw > 0.5)
    assert found[:3].tolist() == [0.0] * 3


def test_the_constant_is_subtracted_from_unsolved_groups_alone() -> None:
    literal = agapo_advantages(GOLDEN, GROUPS, GOLDEN > 0, constant=0.3)
    found = agapo_advantages(GOLDEN, GROUPS, GOLDEN > 0, all_incorrect="constant", constant=0.3)
    assert torch.equal(found[4:8], values(-0.3, -0.3, -0.3, -0.3))
    assert torch.equal(found[GROUPS != 1], literal[GROUPS != 1])


def test_against_the_batch_an_unsolved_group_is_truly_negative() -> None:
    found = agapo_advantages(GOLDEN, GROUPS, GOLDEN > 0, all_incorrect="batch_baseline", eps=0.0)
    local = [1, *[-1 / 3] * 3, *[-0.25] * 4, *[2 / 3] * 2, *[-2 / 3] * 2]
    mean = math.fsum(local) / 12
    assert found.tolist() == pytest.approx([(x - mean) / naive_std(local, 0) for x in local], abs=1e-12)
    assert (found[4:8] < 0).all()


def test_correct_decides_what_is_unsolved_not_the_reward() -> None:
    rewards, index = values(0.2, 0, 1, 0), torch.tensor([0, 0, 1, 1])
    found = agapo_advantages(rewards, index, torch.tensor([0, 0, 1, 0]).bool(), all_incorrect="constant", constant=1)
    literal = agapo_advantages(rewards, index, torch.tensor([0, 0, 1, 0]).bool())
    torch.testing.assert_close(literal - found, values(1, 1, 0, 0), atol=1e-15, rtol=0)
    assert literal[0] > 0 > literal[1]


@pytest.mark.parametrize("all_incorrect", ["literal", "batch_baseline", "constant"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_a_batch_of_equal_rewards_has_zero_advantages(all_incorrect: str, value: float) -> None:
    correct = torch.tensor([0, 0, 0, 1, 0, 0, 0]).bool()
    found = agapo_advantages(
        torch.full((7,), value), torch.tensor([0] * 3 + [1] * 4), correct, all_incorrect=all_incorrect, eps=1e-9
    )
    assert found.tolist() == [0.0] * 7


@given(groups=batches, ddof=st.integers(0, 1), all_incorrect=st.sampled_from(["literal", "batch_baseline"]))
def test_agapo_agrees_with_a_naive_loop(groups: list[list[float]], ddof: int, all_incorrect: str) -> None:
    rewards, index = flat(groups)
    every, local = [r for group in groups for r in group], []
    for group in groups:
        unsolved = all_incorrect == "batch_baseline" and max(group) <= 0
        local += [
            r - math.fsum(every) / len(every) if unsolved else naive("leave_one_out", group, i)
            for i, r in enumerate(group)
        ]
    mean, std = math.fsum(local) / len(local), naive_std(local, ddof)
    found = agapo_advantages(rewards, index, rewards > 0, all_incorrect=all_incorrect, eps=0.1, ddof=ddof)
    torch.testing.assert_close(found, values(*((x - mean) / (std + 0.1) for x in local)), atol=1e-10, rtol=0)


def test_agapo_carries_no_gradient_and_wants_one_verdict_a_sample() -> None:
    assert not agapo_advantages(GOLDEN.clone().requires_grad_(), GROUPS, GOLDEN > 0).requires_grad
    with pytest.raises(ValueError, match=r"correct \(3,\)"):
        agapo_advantages(GOLDEN, GROUPS, torch.ones(3).bool())


# --- shaping ----------------------------------------------------------------------------------------------------------


def test_the_overlong_penalty_by_hand() -> None:
    tokens = torch.tensor([0, 1, 16384, 16385, 18432, 20480, 20481, 10**6])
    found = soft_overlong_penalty(tokens, max_tokens=20480, buffer_tokens=4096)
    assert found.is_floating_point()
    assert found.tolist() == [0, 0, 0, -1 / 4096, -0.5, -1, -1, -1]


@pytest.mark.parametrize("buffer_tokens", [0, -1, 11])
def test_an_overlong_buffer_outside_the_length_is_refused(buffer_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"buffer_tokens {buffer_tokens} must be in 1 .. max_tokens 10"):
        soft_overlong_penalty(torch.tensor([3]), max_tokens=10, buffer_tokens=buffer_tokens)
