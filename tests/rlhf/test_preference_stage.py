"""Which pairs or groups each optimiser step of a preference stage trains, and the reference log-probs they bring."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.dpo import Dpo
from rlhf.algorithms.grouper import Grouper
from rlhf.algorithms.simper import Simper
from rlhf.batches.ragged import PairSequences, Sequences
from rlhf.config import PreferenceStage
from rlhf.errors import CheckpointError
from rlhf.phases import Phases
from rlhf.samples import PreferenceGroup, PreferencePair, TokenizedExample
from rlhf.stages import preference
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


# --- reference log-probs ----------------------------------------------------------------------------------------------


def example(start: int, completion_tokens: int) -> TokenizedExample:
    tokens = np.arange(start, start + 2 + completion_tokens, dtype=np.int32)
    return TokenizedExample(tokens, np.arange(len(tokens)) >= 2)


PAIRS = [PreferencePair(f"p{n}", example(100 * n, 1 + n), example(100 * n + 50, 3)) for n in range(5)]


class Learners:
    """The log-prob of a token is minus its id."""

    def __init__(self) -> None:
        self.asked: list[Sequences] = []

    def logprobs(self, batch: Sequences) -> np.ndarray:
        self.asked.append(batch)
        return np.where(batch.loss_mask, -batch.token_ids, 0).astype(np.float32)


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(preference, "_UNITS_AT_ONCE", 2)
    notes: list[str] = []
    return SimpleNamespace(
        config=SimpleNamespace(cache_root=str(tmp_path), model=SimpleNamespace(dtype="float32")),
        policy=Path("some/model"),
        parts=SimpleNamespace(learners=Learners()),
        console=SimpleNamespace(note=notes.append),
        phases=Phases,
    )


def expected(batch: PairSequences) -> list[float]:
    return [-float(t) if on else 0.0 for t, on in zip(batch.token_ids, batch.loss_mask, strict=True)]


@pytest.mark.parametrize("chosen", [[2, 0], [4], [0, 1, 2, 3, 4]])
def test_reference_log_probs_of_all_units_are_found_again_in_any_step(context: Any, chosen: list[int]) -> None:
    reference = preference._reference(context, PAIRS, stored=False)
    assert [len(batch) for batch in context.parts.learners.asked] == [4, 4, 2]
    batch = preference._batch(Dpo(), PAIRS, chosen, reference)
    assert isinstance(batch, PairSequences)
    assert batch.token_ids[batch.offsets[:-1]][::2].tolist() == [100 * number for number in chosen]
    assert batch.reference_logprobs.tolist() == expected(batch)
    assert batch.reference_logprobs.dtype == np.float32


def test_they_are_computed_once_and_read_again_bit_by_bit(context: Any) -> None:
    first = preference._reference(context, PAIRS, stored=False)
    second = preference._reference(context, PAIRS, stored=False)
    assert len(context.parts.learners.asked) == 3
    for ours, theirs in zip(first, second, strict=True):
        assert all(map(np.array_equal, ours, theirs))
    preference._reference(context, PAIRS[1:], stored=False)
    assert len(context.parts.learners.asked) == 5


def test_a_resumed_stage_takes_what_was_stored_and_never_computes_it_with_later_weights(context: Any) -> None:
    with pytest.raises(CheckpointError, match=r"reference-\w+\.npz: must be there to resume this stage"):
        preference._reference(context, PAIRS, stored=True)
    assert context.parts.learners.asked == []
    first = preference._reference(context, PAIRS, stored=False)
    again = preference._reference(context, PAIRS, stored=True)
    for ours, theirs in zip(first, again, strict=True):
        assert all(map(np.array_equal, ours, theirs))


def test_units_of_different_sizes_keep_their_own(context: Any) -> None:
    groups = [
        PreferenceGroup("a", (example(0, 1), example(10, 2), example(20, 3)), (1.0, 0.0, 0.5)),
        PreferenceGroup("b", (example(30, 2), example(40, 1)), (1.0, 0.0)),
    ]
    reference = preference._reference(context, groups, stored=False)
    assert [[row.tolist() for row in unit] for unit in reference] == [
        [[0, 0, -2], [0, 0, -12, -13], [0, 0, -22, -23, -24]],
        [[0, 0, -32, -33], [0, 0, -42]],
    ]


def test_an_algorithm_without_a_reference_gets_none() -> None:
    assert preference._batch(Simper(), PAIRS, [1, 0], None).reference_logprobs.shape == (0,)
    groups = [PreferenceGroup("a", (example(0, 1), example(10, 2)), (1.0, 0.0))]
    assert preference._batch(Grouper(), groups, [0], None).reference_logprobs.shape == (0,)
