"""Short answers: full reward up to the target, none from the limit on."""

from __future__ import annotations

import pytest

from rewards.conciseness import conciseness
from rewards.registry import RewardInput


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 1.0), (99, 1.0), (100, 1.0), (150, 0.75), (200, 0.5), (300, 0.0), (9999, 0.0)]
)
def test_the_reward_falls_in_a_straight_line_from_the_target_to_the_limit(tokens: int, value: float) -> None:
    sample = RewardInput.of("x", completion_tokens=tokens)
    assert conciseness(sample, target_tokens=100, max_tokens=300).value == pytest.approx(value)


def test_a_truncated_completion_gets_zero_however_short() -> None:
    score = conciseness(RewardInput.of("x", completion_tokens=3, truncated=True), target_tokens=100, max_tokens=300)
    assert score.value == 0.0
    assert "truncated" in score.reason


@pytest.mark.parametrize(("target", "limit"), [(300, 300), (400, 300), (-1, 300)])
def test_impossible_limits_are_an_error_not_a_value(target: int, limit: int) -> None:
    with pytest.raises(
        ValueError, match=f"target_tokens = {target}: must be at least 0 and below max_tokens = {limit}"
    ):
        conciseness(RewardInput.of("x"), target_tokens=target, max_tokens=limit)
