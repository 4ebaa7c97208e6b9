from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.metrics import EXTREMA, MAXIMA, DeviceMetrics, MetricSums, merged

RATIO, GAP, ENTROPY = EXTREMA[0], MAXIMA[0], "policy/entropy_nats"
NAN = math.nan
values_of_tokens = st.lists(st.floats(-100, 100), min_size=1, max_size=20)


def sums_of(name: str, values: list[float]) -> MetricSums:
    found = DeviceMetrics()
    found.add({name: torch.tensor([values], dtype=torch.float64)}, torch.ones(1, len(values), dtype=torch.bool))
    return found.sums()


# --- against plain loops ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One micro-batch: `values[k][b][t]` of metric k, and where they count."""

    values: list[list[list[float]]]
    mask: list[list[bool]]

    def add_to(self, metrics: DeviceMetrics) -> None:
        mask = torch.tensor(self.mask)
        junk = torch.where(torch.arange(mask.numel()).view_as(mask) % 2 == 0, NAN, math.inf)
        tables = [torch.where(mask, torch.tensor(table, dtype=torch.float64), junk) for table in self.values]
        metrics.add(dict(zip((RATIO, GAP, ENTROPY), tables, strict=True)), mask)

    def chosen(self, number: int) -> list[float]:
        rows = zip(self.values[number], self.mask, strict=True)
        return [value for row, on in rows for value, one in zip(row, on, strict=True) if one]


@st.composite
def parts(draw: st.DrawFn) -> Part:
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def table(element: st.SearchStrategy[object]) -> st.SearchStrategy[list[list[object]]]:
        return st.lists(st.lists(element, min_size=width, max_size=width), min_size=rows, max_size=rows)

    values = [draw(table(st.floats(-100, 100))) for _ in range(3)]
    return Part(values, draw(table(st.booleans())))  # type: ignore[arg-type]


def expected(numbers: list[list[float]]) -> dict[str, float]:
    out = {}
    for name, found in zip((RATIO, GAP, ENTROPY), numbers, strict=True):
        if not found:
            continue
        out[name] = sum(found) / len(found)
        if name == RATIO:
            out[f"{name}_min"] = min(found)
        if name in (RATIO, GAP):
            out[f"{name}_max"] = max(found)
    return out


@given(given_parts=st.lists(parts(), max_size=4))
def test_micro_batches_together_agree_with_a_plain_loop_whatever_stands_off_the_mask(given_parts: list[Part]) -> None:
    metrics = DeviceMetrics()
    for part in given_parts:
        part.add_to(metrics)
    everything = [[value for part in given_parts for value in part.chosen(number)] for number in range(3)]
    assert metrics.sums().result() == pytest.approx(expected(everything), abs=1e-9)


@given(given_parts=st.lists(parts(), min_size=1, max_size=4))
def test_merging_ranks_is_the_same_as_one_rank_with_all_micro_batches(given_parts: list[Part]) -> None:
    ranks = []
    for part in given_parts:
        rank = DeviceMetrics()
        part.add_to(rank)
        ranks.append(rank.sums())
    everything = [[value for part in given_parts for value in part.chosen(number)] for number in range(3)]
    assert merged(ranks).result() == pytest.approx(expected(everything), abs=1e-9)


@given(rows=st.lists(st.tuples(st.floats(-9, 9), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_a_metric_of_rows_is_averaged_over_those_that_have_one_and_are_present(
    rows: list[tuple[float, bool, bool]],
) -> None:
    values = torch.tensor([value if has else NAN for value, has, _ in rows])
    has, present = (torch.tensor([row[column] for row in rows]) for column in (1, 2))
    metrics = DeviceMetrics()
    metrics.add_rows({"preference/margin": (values, has), "preference/accuracy": (-values, has)}, present)
    chosen = [value for value, mine, there in rows if mine and there]
    mean = sum(chosen) / len(chosen) if chosen else 0.0
    wanted = {"preference/margin": mean, "preference/accuracy": -mean} if chosen else {}
    assert metrics.sums().result() == pytest.approx(wanted, abs=1e-5)


@given(values=st.lists(values_of_tokens, min_size=1, max_size=5))
def test_a_mean_of_ranks_counts_each_token_once(values: list[list[float]]) -> None:
    found = merged(sums_of(RATIO, part) for part in values).result()
    everything = [value for part in values for value in part]
    assert found[RATIO] == pytest.approx(sum(everything) / len(everything), abs=1e-9)
    assert found[f"{RATIO}_min"] == min(everything)
    assert found[f"{RATIO}_max"] == max(everything)


# --- the edge ---------------------------------------------------------------------------------------------------------


def test_only_tokens_on_the_mask_count() -> None:
    metrics = DeviceMetrics()
    metrics.add({"policy/nll_nats": torch.tensor([[1.0, NAN, 3.0]])}, torch.tensor([[True, False, True]]))
    assert metrics.sums().result() == {"policy/nll_nats": 2.0}


def test_a_broken_value_on_the_mask_is_seen() -> None:
    assert math.isnan(sums_of(ENTROPY, [1.0, NAN]).result()[ENTROPY])
    assert sums_of(RATIO, [1.0, math.inf]).result()[f"{RATIO}_max"] == math.inf


def test_metrics_with_masks_of_their_own_stay_apart() -> None:
    metrics = DeviceMetrics()
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    metrics.add({"mismatch/kl_nats": values}, torch.ones(2, 2, dtype=torch.bool))
    metrics.add({"mismatch/fresh/kl_nats": values}, torch.tensor([[True, True], [False, False]]))
    metrics.add_rows({"preference/margin": (values[0], torch.tensor([False, True]))}, torch.tensor([True, True]))
    assert metrics.sums().result() == {
        "mismatch/kl_nats": 2.5,
        "mismatch/fresh/kl_nats": 1.5,
        "preference/margin": 2.0,
    }


def test_a_part_without_tokens_leaves_no_trace() -> None:
    empty = DeviceMetrics()
    empty.add({RATIO: torch.zeros(1, 2)}, torch.zeros(1, 2, dtype=torch.bool))
    empty.add({}, torch.ones(1, 2, dtype=torch.bool))
    empty.add_rows({}, torch.ones(1, dtype=torch.bool))
    assert empty.sums().result() == {}
    assert merged([empty.sums(), sums_of(RATIO, [2.0])]).result()[RATIO] == 2.0
    assert DeviceMetrics().sums().result() == {}


def test_extremes_are_kept_only_where_they_say_something() -> None:
    assert set(sums_of(ENTROPY, [1.0, 2.0]).result()) == {ENTROPY}
    assert set(sums_of(GAP, [1.0, 2.0]).result()) == {GAP, f"{GAP}_max"}
    assert set(sums_of(RATIO, [1.0, 2.0]).result()) == {RATIO, f"{RATIO}_min", f"{RATIO}_max"}


def test_values_with_a_gradient_are_detached() -> None:
    metrics = DeviceMetrics()
    metrics.add({"policy/nll_nats": torch.ones(1, 1, requires_grad=True)}, torch.ones(1, 1, dtype=torch.bool))
    assert not any(total.requires_grad for total in metrics._totals)
    assert metrics.sums().result() == {"policy/nll_nats": 1.0}


def test_sums_are_float64_however_narrow_the_values() -> None:
    """A bfloat16 sum of ones would stop at 256."""
    metrics = DeviceMetrics()
    metrics.add({ENTROPY: torch.ones(1, 1000, dtype=torch.bfloat16)}, torch.ones(1, 1000, dtype=torch.bool))
    assert metrics.sums().totals == {ENTROPY: [1000.0, 1000.0, 1.0, 1.0]}


def test_what_is_merged_in_is_not_changed() -> None:
    first, second = sums_of(RATIO, [1.0]), sums_of(RATIO, [3.0])
    merged([first, second])
    assert (first.result()[RATIO], second.result()[RATIO]) == (1.0, 3.0)
