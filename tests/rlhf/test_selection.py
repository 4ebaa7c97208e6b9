from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from rlhf.samples import Abstained, RewardFailed, RewardOutcome, RewardValue, ScoredGroup
from rlhf.selection import Arrivals, GroupFilter, Rejected, select

ABSTAINED = Abstained("judge", "not applicable")
FAILED = RewardFailed("math", "boom", "Traceback ...", 2)


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ((1.0, 0.0), None),
        ((1.0, 0.0, ABSTAINED), None),
        ((1.0, 0.0, FAILED, ABSTAINED), None),
        ((1.0, 1.0), Rejected("filtered", "all_correct")),
        ((0.0, 0.0), Rejected("filtered", "all_wrong")),
        ((-1.0, -1.0), Rejected("filtered", "all_wrong")),
        ((1.0, 1.0, ABSTAINED), Rejected("filtered", "all_correct")),
        ((1.0, FAILED), Rejected("reward_error", "math")),
        ((ABSTAINED, FAILED), Rejected("reward_error", "math")),
        ((1.0, ABSTAINED), Rejected("abstained", "judge")),
        ((ABSTAINED, ABSTAINED), Rejected("abstained", "judge")),
        ((1.0,), Rejected("filtered", "too_few_samples")),
    ],
)
def test_which_groups_train_and_why_others_do_not(
    make_scored: Callable[..., ScoredGroup], outcomes: Sequence[float | RewardOutcome], verdict: Rejected | None
) -> None:
    assert select(make_scored(outcomes), "zero_variance") == verdict


def test_equal_rewards_train_where_the_algorithm_does_not_filter_them(make_scored: Callable[..., ScoredGroup]) -> None:
    assert select(make_scored((1.0, 1.0)), "none") is None


@pytest.mark.parametrize(
    ("tasks", "dropped_by"),
    [
        ((1.0, 0.7), {"not_mixed": "all_correct", "all_correct": "all_correct"}),
        ((0.2, 0.0), {"not_mixed": "all_wrong"}),
        ((1.0, 0.0), {}),
    ],
)
@pytest.mark.parametrize("group_filter", ["none", "all_correct", "not_mixed", "zero_variance"])
def test_what_is_correct_is_said_by_the_task_value_and_its_threshold(
    make_scored: Callable[..., ScoredGroup],
    tasks: Sequence[float],
    dropped_by: dict[str, str],
    group_filter: GroupFilter,
) -> None:
    scored = make_scored([RewardValue(float(i), task, {}) for i, task in enumerate(tasks)])
    found = select(scored, group_filter, correct_at=0.5)
    rule = dropped_by.get(group_filter)
    assert found == (None if rule is None else Rejected("filtered", rule))


def test_equal_rewards_of_right_and_wrong_samples_are_not_called_all_wrong(
    make_scored: Callable[..., ScoredGroup],
) -> None:
    right, wrong = RewardValue(0.5, 1.0, {}), RewardValue(0.5, 0.0, {})
    assert select(make_scored((right, wrong)), "zero_variance") == Rejected("filtered", "mixed_equal")
    assert select(make_scored((right, wrong)), "not_mixed") is None


def test_a_group_with_an_empty_completion_is_filtered(make_scored: Callable[..., ScoredGroup]) -> None:
    found = select(make_scored((1.0, 0.0), completion_tokens=[3, 0]), "none")
    assert found == Rejected("filtered", "empty_completion")


def test_an_algorithm_without_a_baseline_may_train_on_one_sample(make_scored: Callable[..., ScoredGroup]) -> None:
    assert select(make_scored((1.0,)), "none", minimum=1) is None


def test_arrivals_count_every_sample_whether_or_not_its_group_trains(make_scored: Callable[..., ScoredGroup]) -> None:
    arrived = Arrivals()
    for group in (
        make_scored((1.0, 0.0), completion_tokens=[1, 5]),
        make_scored((1.0, 1.0), completion_tokens=[2, 2]),
        make_scored((FAILED, ABSTAINED, 0.5), completion_tokens=[3, 3, 3]),
    ):
        arrived.add(group)
    metrics = arrived.metrics()
    assert (metrics["rollout/groups"], metrics["rollout/samples"]) == (3, 7)
    assert metrics["reward/mean"] == pytest.approx((1 + 0 + 1 + 1 + 0.5) / 5)
    assert metrics["reward/part/math"] == metrics["reward/task"] == metrics["reward/mean"]
    assert (metrics["reward/failed"], metrics["reward/abstained"]) == (1, 1)
    assert metrics["rollout/completion_tokens"] == pytest.approx(19 / 7)
    assert metrics["rollout/completion_tokens_max"] == 5


def test_a_group_in_which_nothing_could_be_scored_has_no_mean_reward(make_scored: Callable[..., ScoredGroup]) -> None:
    arrived = Arrivals()
    arrived.add(make_scored((FAILED, FAILED)))
    assert "reward/mean" not in arrived.metrics()
    assert arrived.metrics()["rollout/zero_variance_fraction"] == 0.0


def test_when_nothing_arrived_there_is_nothing_to_report() -> None:
    assert Arrivals().metrics() == {}
