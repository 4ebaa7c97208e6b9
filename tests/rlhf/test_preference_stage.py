"""Which pairs or groups each optimiser step of a preference stage trains."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import PreferenceStage
from rlhf.stages.preference import optimiser_steps, steps


def stage_of(batch_size: int = 4, epochs: float = 1.0) -> PreferenceStage:
    return PreferenceStage.model_validate(
        {
            "kind": "preference",
            "data": "collect",
            "batch_size": batch_size,
            "epochs": epochs,
            "optimizer": {"learning_rate": 1e-5},
        }
    )


units_st, batch_st, seed_st = st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**32)
epochs_st = st.one_of(st.integers(1, 4).map(float), st.floats(0.05, 4.0))


@given(units=units_st, batch_size=batch_st, epochs=st.integers(1, 4), seed=seed_st)
def test_every_epoch_trains_each_unit_once(units: int, batch_size: int, epochs: int, seed: int) -> None:
    order = [n for step in steps(units, stage_of(batch_size, epochs), seed) for n in step]
    for start in range(0, units * epochs, units):
        assert sorted(order[start : start + units]) == list(range(units))
    assert len(order) == units * epochs


@given(units=units_st, batch_size=batch_st, epochs=epochs_st, seed=seed_st)
def test_a_fraction_of_an_epoch_trains_so_many_units_and_none_twice_more_than_another(
    units: int, batch_size: int, epochs: float, seed: int
) -> None:
    counts = Counter(n for step in steps(units, stage_of(batch_size, epochs), seed) for n in step)
    assert counts.total() == math.ceil(units * epochs)
    times = [counts[n] for n in range(units)]
    assert max(times) - min(times) <= 1
    assert set(counts) <= set(range(units))


@given(units=units_st, batch_size=batch_st, epochs=epochs_st, seed=seed_st)
def test_only_the_last_step_is_smaller_and_there_are_as_many_as_the_schedule_expects(
    units: int, batch_size: int, epochs: float, seed: int
) -> None:
    stage = stage_of(batch_size, epochs)
    sizes = [len(step) for step in steps(units, stage, seed)]
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size
    assert len(sizes) == optimiser_steps(units, stage)


@pytest.mark.parametrize(
    ("units", "batch_size", "epochs", "wanted"),
    [(10, 4, 1.0, 3), (10, 5, 1.0, 2), (10, 4, 2.0, 5), (10, 4, 0.5, 2), (3, 32, 1.0, 1), (1, 1, 0.01, 1)],
)
def test_the_number_of_optimiser_steps(units: int, batch_size: int, epochs: float, wanted: int) -> None:
    assert optimiser_steps(units, stage_of(batch_size, epochs)) == wanted


def test_the_seed_decides_the_order_and_every_epoch_has_its_own() -> None:
    stage = stage_of(20, 2.0)
    first, second = steps(20, stage, 7)
    assert [first, second] == list(steps(20, stage, 7))
    assert first != second
    assert first != next(steps(20, stage, 8))


def test_a_longer_stage_begins_like_a_shorter_one() -> None:
    short, long = list(steps(20, stage_of(5, 1.0), 7)), list(steps(20, stage_of(5, 3.0), 7))
    assert long[: len(short)] == short
