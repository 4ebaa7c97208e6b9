"""Which prompts stay, by how many of their completions are correct."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import FilterStage, RunConfig
from rlhf.errors import DataError
from rlhf.filtering import FilterReport, cache_key, correct_samples
from rlhf.samples import Abstained, RewardFailed, ScoredGroup

ABSTAINED = Abstained("math", "no answer")
FAILED = RewardFailed("math", "crashed", "Traceback", 2)

SOURCE = {"kind": "procedural"}
RUN = {
    "experiment": "test",
    "model": {"kind": "exaone4_tiny"},
    "data": {"train": SOURCE, "evaluation": SOURCE},
    "stages": {"filter": {"kind": "filter"}},
    "algorithm": {"name": "grpo_icepop"},
    "rewards": {"components": {"math": {}}},
}


def stage(samples: int = 4, **settings: Any) -> FilterStage:
    return FilterStage(kind="filter", samples_per_prompt=samples, **settings)


def test_prompts_that_are_always_solved_go_and_the_others_stay(make_scored: Callable[..., ScoredGroup]) -> None:
    groups = [make_scored([1.0] * n + [0.0] * (4 - n)) for n in (4, 0, 2, 4, 3)]
    report = FilterReport.of(groups, stage(), correct_at=1.0)
    assert report.correct == (4, 0, 2, 4, 3)
    assert report.kept == (1, 2, 4)
    assert report.dropped == (0, 3)
    assert report.histogram == (1, 0, 1, 1, 2)
    assert report.counts == {"kept": 3, "too_easy": 2, "too_hard": 0, "unscored": 0}


def test_the_thresholds_of_the_stage_decide() -> None:
    report = FilterReport.judged(range(9), stage(8, drop_at_least=7, drop_at_most=1))
    assert report.kept == (2, 3, 4, 5, 6)
    assert report.counts == {"kept": 5, "too_easy": 2, "too_hard": 2, "unscored": 0}


def test_a_partial_task_value_is_correct_only_from_the_threshold_on(make_scored: Callable[..., ScoredGroup]) -> None:
    group = make_scored([0.4, 0.5, 0.9, 1.0])
    assert [correct_samples(group, at) for at in (0.4, 0.5, 1.0)] == [4, 3, 1]


@pytest.mark.parametrize(
    ("outcomes", "count"),
    [
        ([1.0, 1.0, ABSTAINED, FAILED], 4),
        ([0.0, 0.0, ABSTAINED, FAILED], 0),
        ([1.0, 0.0, FAILED, FAILED], 2),
        ([1.0, 1.0, 0.0, FAILED], 3),
        ([1.0, FAILED, FAILED, ABSTAINED], None),
        ([FAILED] * 4, None),
    ],
)
def test_unvalued_samples_leave_the_judgement_to_the_others_where_half_have_a_value(
    make_scored: Callable[..., ScoredGroup], outcomes: list[Any], count: int | None
) -> None:
    assert correct_samples(make_scored(outcomes), 1.0) == count


@given(st.integers(0, 16), st.integers(0, 16), st.integers(0, 16))
def test_a_scaled_count_is_all_or_nothing_only_when_every_valued_sample_agrees(
    make_scored: Callable[..., ScoredGroup], right: int, wrong: int, failed: int
) -> None:
    valued = right + wrong
    count = correct_samples(make_scored([1.0] * right + [0.0] * wrong + [FAILED] * failed), 1.0)
    if not valued or valued < failed:
        assert count is None
    else:
        assert (count == valued + failed) == (wrong == 0)
        assert (count == 0) == (right == 0)


def test_an_unscored_prompt_stays_and_is_counted(make_scored: Callable[..., ScoredGroup]) -> None:
    report = FilterReport.of([make_scored([FAILED] * 4), make_scored([1.0] * 4)], stage(drop_at_most=1), 1.0)
    assert report.kept == (0,)
    assert report.counts == {"kept": 0, "too_easy": 1, "too_hard": 0, "unscored": 1}
    assert sum(report.histogram) == 1
    assert report.describe()[-1] == ("kept 1 of 2 prompts, 1 unscored among them; dropped 1 too easy and 0 too hard")


@given(st.lists(st.one_of(st.none(), st.integers(0, 8))), st.integers(1, 8), st.integers(0, 8))
def test_every_prompt_is_counted_once(counts: list[int | None], at_least: int, at_most: int) -> None:
    report = FilterReport.judged(counts, stage(8, drop_at_least=at_least, drop_at_most=at_most))
    assert sorted([*report.kept, *report.dropped]) == list(range(len(counts)))
    assert sum(report.counts.values()) == len(counts)
    assert sum(report.histogram) + report.counts["unscored"] == len(counts)


def test_the_description_is_a_histogram_with_what_is_dropped() -> None:
    report = FilterReport.judged([0] * 5 + [1] * 20 + [2] * 40 + [3] * 10, stage(3, drop_at_most=0))
    assert report.describe() == [
        "correct of 3, prompts:",
        "   0  5 #####                                    dropped, too hard",
        "   1 20 ####################",
        "   2 40 ########################################",
        "   3 10 ##########                               dropped, too easy",
        "kept 60 of 75 prompts; dropped 10 too easy and 5 too hard",
    ]


def test_a_report_without_prompts_can_be_described() -> None:
    assert FilterReport.judged([], stage(1)).describe()[-1].startswith("kept 0 of 0 prompts")


def test_stored_counts_come_back_under_new_thresholds() -> None:
    report = FilterReport.judged([0, None, 4, 2], stage())
    assert FilterReport.from_json(report.to_json(), stage()) == report
    assert FilterReport.from_json(report.to_json(), stage(drop_at_most=0)).kept == (1, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "'samples'"),
        (json.dumps({"samples": 4, "correct": "4"}), "correct is not a list of counts"),
        (json.dumps({"samples": 4, "correct": [1.5]}), "correct is not a list of counts"),
        (json.dumps({"samples": 8, "correct": [1]}), "it has 8 samples a prompt, the stage 4"),
        (json.dumps({"samples": 4, "correct": [5]}), "correct counts must lie between 0 and 4"),
    ],
)
def test_a_broken_cache_is_refused_with_the_fix(text: str, message: str) -> None:
    with pytest.raises(DataError, match=r"filter cache: must hold the counts of this stage") as refused:
        FilterReport.from_json(text, stage())
    assert message in str(refused.value)
    assert "Remove the file" in str(refused.value)


def run(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(RUN | changes)


def test_the_cache_key_changes_with_what_changes_the_counts_alone() -> None:
    key = cache_key("model", "data", run(), stage())
    assert cache_key("model", "data", run(), stage(drop_at_least=3, drop_at_most=1)) == key
    others = [
        cache_key("other", "data", run(), stage()),
        cache_key("model", "other", run(), stage()),
        cache_key("model", "data", run(), stage(8)),
        cache_key("model", "data", run(), stage(temperature=0.5)),
        cache_key("model", "data", run(), stage(prompts=7)),
        cache_key("model", "data", run(seed=1), stage()),
        cache_key("model", "data", run(rollouts={"max_completion_tokens": 3}), stage()),
        cache_key("model", "data", run(rewards={"components": {"math": {"weight": 2.0}}}), stage()),
        cache_key("model", "data", run(rewards={"components": {"math": {}}, "correct_at": 0.5}), stage()),
        cache_key("model", "data", run(), stage(), "reasoning"),
    ]
    assert len({key, *others}) == len(others) + 1
