from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf.config import CollectStage
from rlhf.errors import DataError
from rlhf.preferences import Selected, pick, pick_all, untrainable
from rlhf.samples import (
    Abstained,
    PreferenceGroup,
    PreferencePair,
    RewardFailed,
    RewardOutcome,
    RewardValue,
    ScoredGroup,
    TokenizedExample,
)

MakeScored = Callable[..., ScoredGroup]
ABSTAINED, FAILED = Abstained("judge", "not applicable"), RewardFailed("math", "boom", "Traceback ...", 2)


@pytest.fixture(name="scored")
def _scored(make_scored: MakeScored) -> MakeScored:
    def make(
        outcomes: Sequence[float | RewardOutcome],
        tokens: Sequence[int] = (),
        truncated: Sequence[int] = (),
        **ids: str,
    ) -> ScoredGroup:
        whole = make_scored(outcomes, completion_tokens=list(tokens) or None, **ids)
        samples = [
            replace(sample, finish_reason="length") if i in truncated else sample
            for i, sample in enumerate(whole.group.samples)
        ]
        return replace(whole, group=replace(whole.group, samples=tuple(samples)))

    return make


def stage(**changes: Any) -> CollectStage:
    return CollectStage(kind="collect", **changes)


def picked(scored: ScoredGroup, **changes: Any) -> list[int] | str:
    """The numbers of the picked samples, or the reason against it."""
    found = pick(scored, stage(**changes), correct_at=1.0)
    return [int(name.split("/")[1]) for name in found.sample_ids] if isinstance(found, Selected) else found


# --- pairs ------------------------------------------------------------------------------------------------------------

SHORTEST = {"chosen": "shortest_correct", "rejected": "incorrect_else_longest_correct"}


def test_the_best_and_the_worst_by_reward_make_a_pair(scored: MakeScored) -> None:
    assert picked(scored((0.2, 0.9, 0.1, 0.5))) == [1, 2]


def test_among_equals_the_earlier_sample_is_taken_whatever_its_length(scored: MakeScored) -> None:
    assert picked(scored((1.0, 0.0, 1.0, 0.0, 1.0, 0.0), tokens=(4, 4, 2, 3, 2, 3))) == [0, 1]


def test_the_shortest_correct_completion_is_chosen_against_an_incorrect_one(scored: MakeScored) -> None:
    group = scored((1.0, 1.0, 0.0, -1.0), tokens=(5, 3, 1, 2))
    assert picked(group, chosen="shortest_correct", rejected="incorrect") == [1, 3]
    assert picked(group, **SHORTEST) == [1, 3]


def test_without_an_incorrect_completion_the_longest_correct_one_is_rejected_where_the_stage_says_so(
    scored: MakeScored,
) -> None:
    group = scored((1.0, 1.0, 1.0), tokens=(5, 3, 7))
    assert picked(group, **SHORTEST) == [1, 2]
    assert picked(group, chosen="shortest_correct", rejected="incorrect") == "no_incorrect"


def test_correct_completions_of_one_length_make_no_pair(scored: MakeScored) -> None:
    assert picked(scored((1.0, 1.0), tokens=(3, 3)), **SHORTEST) == "same_length"


@pytest.mark.parametrize("chosen", ["shortest_correct", "highest_reward"])
def test_a_truncated_completion_is_never_chosen_but_may_be_rejected(scored: MakeScored, chosen: str) -> None:
    group = scored((1.0, 1.0, 0.0), tokens=(2, 6, 9), truncated=(0, 2))
    assert picked(group, chosen=chosen) == [1, 2]


def test_where_every_completion_is_truncated_nothing_is_chosen(scored: MakeScored) -> None:
    group = scored((1.0, 0.0), truncated=(0, 1))
    assert picked(group) == "all_truncated"
    assert picked(group, chosen="shortest_correct") == "no_correct"


def test_without_a_correct_completion_the_shortest_correct_does_not_exist(scored: MakeScored) -> None:
    assert picked(scored((0.9, 0.0)), chosen="shortest_correct") == "no_correct"


def test_correct_goes_by_the_task_value_and_the_threshold_of_the_run(scored: MakeScored) -> None:
    values = [RewardValue(-1.0, 0.6, {}), RewardValue(-2.0, 0.4, {})]
    found = pick(scored(values), stage(chosen="shortest_correct", rejected="incorrect"), correct_at=0.5)
    assert isinstance(found, Selected)
    assert found.tasks == (0.6, 0.4)


@pytest.mark.parametrize(("gap", "found"), [(0.0, [0, 1]), (0.4, [0, 1]), (0.5, "reward_gap"), (2.0, "reward_gap")])
def test_the_rewards_of_a_pair_differ_by_more_than_the_gap(scored: MakeScored, gap: float, found: Any) -> None:
    assert picked(scored((1.0, 0.5)), min_reward_gap=gap) == found


def test_equal_rewards_and_a_chosen_with_the_lower_reward_make_no_pair(scored: MakeScored) -> None:
    assert picked(scored((0.5, 0.5))) == "reward_gap"
    shaped = [RewardValue(-0.5, 1.0, {}), RewardValue(0.1, 0.0, {})]
    assert picked(scored(shaped), chosen="shortest_correct", rejected="incorrect") == "reward_gap"


# --- who enters -------------------------------------------------------------------------------------------------------


def test_samples_without_a_reward_and_empty_completions_never_enter(scored: MakeScored) -> None:
    assert picked(scored((ABSTAINED, 0.4, FAILED, 0.6, 9.0), tokens=(3, 3, 3, 3, 0))) == [3, 1]


@pytest.mark.parametrize(
    ("outcomes", "tokens", "reason"),
    [
        ((1.0, ABSTAINED, FAILED), (3, 3, 3), "reward_error"),
        ((1.0, ABSTAINED), (3, 3), "abstained"),
        ((1.0, 0.0), (3, 0), "too_few_samples"),
    ],
)
def test_the_reason_why_too_few_samples_are_left(
    scored: MakeScored, outcomes: Sequence[Any], tokens: Sequence[int], reason: str
) -> None:
    assert picked(scored(outcomes, tokens)) == reason


def test_weights_make_the_reward_out_of_its_parts(scored: MakeScored) -> None:
    outcomes = [RewardValue(9.0, 1.0, {"math": 1.0, "tone": 0.1}), RewardValue(0.0, 1.0, {"math": 0.5, "tone": 0.9})]
    found = pick(scored(outcomes), stage(weights={"tone": 2.0, "math": 1.0}), correct_at=1.0)
    assert isinstance(found, Selected)
    assert found.rewards == pytest.approx((2.3, 1.2))
    assert found.parts[0] == {"math": 0.5, "tone": 0.9}


def test_a_weight_for_a_part_that_a_sample_lacks_is_an_error_that_names_both(scored: MakeScored) -> None:
    with pytest.raises(DataError, match=r"weights\.tone: .* Sample g0/0 has math\."):
        pick(scored((1.0, 0.0)), stage(weights={"tone": 1.0}), correct_at=1.0)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_has_the_best_the_worst_and_random_others_in_sample_order(scored: MakeScored) -> None:
    rewards = (0.3, 0.9, 0.5, 0.1, 0.4, 0.6, 0.7, 0.2)
    members = set()
    for number in range(20):
        found = picked(scored(rewards, group_id=f"g{number}"), produce="groups", group_size=4)
        assert isinstance(found, list)
        assert {1, 3} <= set(found)
        assert len(found) == 4
        assert found == sorted(found)
        members |= set(found)
    assert members == set(range(8))


def test_the_members_of_a_group_depend_on_the_seed_and_its_id_alone(scored: MakeScored) -> None:
    group, settings = scored([i / 16 for i in range(16)]), stage(produce="groups", group_size=4)
    by_seed = [pick(group, settings, correct_at=1.0, seed=seed) for seed in (1, 1, 2)]
    assert all(isinstance(found, Selected) for found in by_seed)
    ids = [found.sample_ids for found in by_seed if isinstance(found, Selected)]
    assert ids[0] == ids[1] != ids[2]


def test_a_group_of_two_is_the_best_and_the_worst(scored: MakeScored) -> None:
    assert picked(scored((0.3, 0.9, 0.1)), produce="groups", group_size=2) == [1, 2]


def test_a_group_without_enough_samples_or_with_equal_rewards_is_left_out(scored: MakeScored) -> None:
    assert picked(scored((1.0, 0.0, ABSTAINED, 0.5)), produce="groups") == "too_few_samples"
    assert picked(scored((0.5,) * 4), produce="groups") == "reward_gap"
    assert picked(scored((0.9, 0.5, 0.5, 0.5)), produce="groups", min_reward_gap=0.5) == "reward_gap"


def test_the_best_of_a_group_has_come_to_its_end(scored: MakeScored) -> None:
    group = scored((1.0, 0.6, 0.2, 0.1, 0.0), truncated=(0, 3))
    assert picked(group, produce="groups") == [1, 2, 3, 4]
    assert picked(group, produce="groups", group_size=5) == "too_few_samples"


def test_all_completions_of_a_group_may_have_its_best_reward_but_one(scored: MakeScored) -> None:
    assert picked(scored((1.0, 1.0, 1.0, 0.0)), produce="groups") == [0, 1, 2, 3]


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_a_selected_pair_has_what_trains_and_what_people_read(scored: MakeScored) -> None:
    group = scored((0.0, 1.0), tokens=(1, 3))
    found = pick(group, stage(), correct_at=1.0)
    assert isinstance(found, Selected)
    assert isinstance(found.unit, PreferencePair)
    assert found.unit.pair_id == "g0"
    assert found.unit.chosen.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert found.unit.chosen.loss_mask.tolist() == [False, False, True, True, True]
    assert found.unit.rejected.token_ids.tolist() == [1, 2, 3]
    assert (found.prompt_id, found.prompt, found.reasoning_mode) == ("prompt-g0", "user: 1+1=?", False)
    assert found.sample_ids == ("g0/1", "g0/0")
    assert found.completions == ("the completion of g0/1", "the completion of g0/0")
    assert found.rewards == found.tasks == (1.0, 0.0)
    assert found.parts == ({"math": 1.0}, {"math": 0.0})
    assert found.completion_tokens == (3, 1)


def test_a_selected_group_has_one_entry_for_each_completion(scored: MakeScored) -> None:
    found = pick(scored((0.5, 1.0, 0.0), tokens=(1, 2, 3)), stage(produce="groups", group_size=3), correct_at=1.0)
    assert isinstance(found, Selected)
    assert isinstance(found.unit, PreferenceGroup)
    assert found.unit.rewards == found.rewards == (0.5, 1.0, 0.0)
    assert [len(completion.token_ids) for completion in found.unit.completions] == [3, 4, 5]
    assert found.completion_tokens == (1, 2, 3)


def test_what_gave_no_pair_is_counted_by_reason(scored: MakeScored) -> None:
    outcomes = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (1.0, ABSTAINED), (0.0, 1.0)]
    groups = [scored(values, group_id=f"g{i}") for i, values in enumerate(outcomes)]
    selected, left_out = pick_all(groups, stage(), correct_at=1.0)
    assert [one.prompt_id for one in selected] == ["prompt-g0", "prompt-g4"]
    assert left_out == {"reward_gap": 2, "abstained": 1}
    assert len(selected) + left_out.total() == len(groups)


def example(completion_tokens: int) -> TokenizedExample:
    mask = np.arange(completion_tokens + 2) >= 2
    return TokenizedExample(np.arange(completion_tokens + 2, dtype=np.int32), mask)


def test_units_that_would_train_nothing_are_told_apart() -> None:
    assert untrainable(PreferencePair("a", example(1), example(2))) is None
    assert untrainable(PreferencePair("a", example(1), example(0))) == "empty_completion"
    assert untrainable(PreferenceGroup("b", (example(1), example(2)), (0.0, 1.0))) is None
    assert untrainable(PreferenceGroup("b", (example(1), example(2)), (0.5, 0.5))) == "equal_rewards"
