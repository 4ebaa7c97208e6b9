from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import OptimizerConfig
from rlhf.training.schedule import learning_rate


def rates(steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(**{"learning_rate": 1.0, **settings})
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_schedule_falls_in_equal_steps_from_the_peak() -> None:
    found = rates(6, warmup_steps=1, schedule="linear", min_learning_rate=0.5)
    assert found == pytest.approx([1.0, 1.0, 0.9, 0.8, 0.7, 0.6])


def test_a_cosine_schedule_is_half_way_down_in_the_middle() -> None:
    found = rates(8, schedule="cosine", min_learning_rate=0.2)
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_step_after_the_last_would_have_the_minimum(schedule: Any) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, min_learning_rate=0.1, warmup_steps=2)
    assert learning_rate(10, 10, config) == pytest.approx(0.1)


@given(
    steps=st.integers(1, 50),
    warmup=st.integers(0, 50),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    low=st.floats(0, 1),
)
def test_rates_stay_between_the_minimum_and_the_peak_and_fall_after_warm_up(
    steps: int, warmup: int, schedule: str, low: float
) -> None:
    found = rates(steps, warmup_steps=warmup, schedule=schedule, min_learning_rate=low)
    assert all(0 < rate <= 1.0 + 1e-12 for rate in found)
    after = found[warmup:]
    assert all(low - 1e-12 <= rate for rate in after)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
