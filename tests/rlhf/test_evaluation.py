"""pass@k and its error against enumeration; what an evaluation leaves out is counted, never taken for wrong."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from rlhf.errors import RewardFailureError
from rlhf.evaluation import pass_at_k, pass_at_k_stderr, summarise
from rlhf.samples import (
    Abstained,
    GroupTokens,
    InMemory,
    Prompt,
    RewardFailed,
    RewardOutcome,
    RewardValue,
    Sample,
    SampleGroup,
    ScoredGroup,
    TextGroup,
    TextSample,
    VersionSpan,
)
from rlhf.thinking import thinks

ABSTAINED = Abstained("math", "no answer")
FAILED = RewardFailed("math", "boom", "Traceback", 2)


def value(task: float) -> RewardValue:
    return RewardValue(task, task, {"math": task})


def sample(completion: str = "42", tokens: int = 3, finish_reason: Any = "stop") -> Sample:
    return Sample("s", 1, tokens, (VersionSpan(0, 0, tokens),), finish_reason, thinks(completion))


def group(*outcomes: RewardOutcome, samples: tuple[Sample, ...] | None = None) -> ScoredGroup:
    prompt = Prompt("p", ({"role": "user", "content": "?"},), "42", "math")
    samples = samples or tuple(sample() for _ in outcomes)
    texts = tuple(TextSample(one.sample_id, "42", one.completion_tokens, one.truncated) for one in samples)
    none = np.zeros(0)
    tokens = GroupTokens(none, none, none, np.zeros(1, np.int64))
    stored = InMemory(tokens, TextGroup("g", prompt, True, 0, texts))
    return ScoredGroup(SampleGroup("g", prompt, True, samples, 0.1, stored), outcomes, 0.01)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * correct + [False] * (n - correct), k))
            assert pass_at_k(correct, n, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


def test_pass_at_k_takes_arrays_and_broadcasts_n() -> None:
    found = pass_at_k(np.array([0, 1, 4]), 4, 2)
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0])


def test_pass_at_k_of_scalars_is_a_float() -> None:
    assert isinstance(pass_at_k(1, 4, 1), float)


def test_pass_at_k_does_not_overflow_for_many_samples() -> None:
    assert pass_at_k(1, 100_000, 1000) == pytest.approx(0.01)


@pytest.mark.parametrize(("correct", "n", "k"), [(0, 3, 4), (0, 3, 0), (4, 3, 1), (-1, 3, 1)])
def test_pass_at_k_refuses_counts_that_cannot_be(correct: int, n: int, k: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        pass_at_k(correct, n, k)


def test_the_standard_error_is_over_prompts_not_samples() -> None:
    # Two prompts, one always right and one never: estimates 1 and 0, deviation sqrt(1/2), over sqrt(2) prompts.
    assert pass_at_k_stderr(np.array([8, 0]), 8, 1) == pytest.approx(0.5)


def test_the_standard_error_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        solve_rate = rng.beta(0.5, 0.5, size=100)
        correct = rng.binomial(8, solve_rate)
        mean, error = float(np.mean(pass_at_k(correct, 8, 1))), pass_at_k_stderr(correct, 8, 1)
        covered.append(abs(mean - 0.5) < 1.96 * error)
    assert 0.92 < np.mean(covered) < 0.98


def test_one_prompt_has_no_standard_error() -> None:
    with pytest.raises(ValueError, match="two prompts"):
        pass_at_k_stderr(np.array([1]), 2, 1)


def test_a_worked_example() -> None:
    greedy = [group(value(1.0)), group(value(0.0))]
    sampled = [group(*map(value, (1, 0, 0, 0))), group(*map(value, (1, 1, 1, 1)))]
    summary = summarise(greedy, sampled, correct_at=1.0, pass_at=(1, 2)).as_summary()
    assert summary["greedy"] == 0.5
    assert summary["pass@1"] == pytest.approx(0.625)
    assert summary["pass@2"] == pytest.approx(0.75)
    assert summary["pass@1_stderr"] == pytest.approx(0.375)
    assert (summary["n_prompts"], summary["samples_per_prompt"], summary["unscored"]) == (2, 4, 0)
    assert not [key for key in summary if "left_out" in key]


def test_unscored_samples_leave_the_count_of_their_prompt_and_are_not_wrong() -> None:
    sampled = [group(value(1), ABSTAINED, FAILED, value(1)), group(value(0), value(0), value(1), value(1))]
    result = summarise([group(value(1)), group(value(1))], sampled, 1.0, (1,))
    assert result.pass_at[1] == pytest.approx((1.0 + 0.5) / 2)
    assert result.unscored == 2
    assert result.unscored_by_cause == {"abstained": 1, "failed": 1}


def test_a_prompt_with_fewer_than_k_values_is_left_out_of_pass_at_k_and_counted() -> None:
    sampled = [group(value(1), ABSTAINED), group(value(0), value(1)), group(value(0), value(0))]
    result = summarise([group(value(1))] * 3, sampled, 1.0, (1, 2))
    assert result.pass_at[1] == pytest.approx(0.5)
    assert result.pass_at[2] == pytest.approx(0.5)
    assert result.prompts_short_of == {1: 0, 2: 1}
    assert result.as_summary()["pass@2_left_out"] == 1


def test_a_greedy_sample_without_value_is_left_out_and_counted() -> None:
    result = summarise([group(value(1)), group(FAILED)], [group(value(1))] * 2, 1.0, (1,))
    assert result.greedy == 1.0
    assert result.prompts_without_greedy == 1
    assert result.as_summary()["greedy_left_out"] == 1


def test_a_figure_over_nothing_is_an_error_that_says_what_happened() -> None:
    with pytest.raises(RewardFailureError, match=r"greedy accuracy, pass@1 \(2 abstained, 1 failed\)"):
        summarise([group(FAILED)], [group(ABSTAINED, ABSTAINED)], 1.0, (1,))


def test_no_error_is_claimed_for_a_single_prompt() -> None:
    result = summarise([group(value(1))], [group(value(1))], 1.0, (1,))
    assert result.pass_at_stderr == {}
    assert "pass@1_stderr" not in result.as_summary()


def test_correct_means_the_task_value_reaches_the_threshold() -> None:
    shaped = RewardValue(value=5.0, task=0.4, parts={})
    result = summarise([group(shaped)], [group(shaped, RewardValue(-1.0, 0.5, {}))], 0.5, (1,))
    assert (result.greedy, result.pass_at[1]) == (0.0, 0.5)


def test_lengths_truncation_and_thinking_count_every_sampled_completion() -> None:
    samples = (sample("<think>so</think>1", 4), sample("1", 2, "length"))
    result = summarise([group(value(1))], [group(value(1), ABSTAINED, samples=samples)], 1.0, (1,))
    assert (result.completion_tokens_mean, result.truncated_fraction, result.thinks_fraction) == (3.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>\n2+2=4\n</think>\n\n4", True),
        ("<think>\n\n</think>\n\n4", False),
        ("<think>\ncut off here", True),
        ("<think>\n", False),
        ("4", False),
    ],
)
def test_thinking_is_a_reasoning_block_with_something_in_it(completion: str, expected: bool) -> None:
    assert thinks(completion) is expected
