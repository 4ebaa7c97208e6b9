from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.metrics import EXTREMA, TokenMetrics, merged

values_of_tokens = st.lists(st.floats(-100, 100), min_size=1, max_size=20)


def metrics_of(name: str, values: list[float]) -> TokenMetrics:
    found = TokenMetrics()
    found.add(name, torch.tensor([values], dtype=torch.float64), torch.ones(1, len(values), dtype=torch.bool))
    return found


def test_only_tokens_on_the_mask_count() -> None:
    metrics = TokenMetrics()
    values = torch.tensor([[1.0, math.nan, 3.0]])
    metrics.add("policy/nll_nats", values, torch.tensor([[True, False, True]]))
    assert metrics.result() == {"policy/nll_nats": 2.0}


@given(parts=st.lists(values_of_tokens, min_size=1, max_size=5))
def test_merging_ranks_is_the_same_as_one_rank_with_all_tokens(parts: list[list[float]]) -> None:
    name = EXTREMA[0]
    found = merged(metrics_of(name, part) for part in parts).result()
    everything = [value for part in parts for value in part]
    assert found[name] == pytest.approx(sum(everything) / len(everything), abs=1e-9)
    assert found[f"{name}_min"] == min(everything)
    assert found[f"{name}_max"] == max(everything)


def test_a_part_without_tokens_leaves_no_trace() -> None:
    empty = TokenMetrics()
    empty.add("policy/ratio", torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert empty.result() == {}
    assert merged([empty, metrics_of("policy/ratio", [2.0])]).result()["policy/ratio"] == 2.0


def test_extremes_are_kept_only_where_they_say_something() -> None:
    assert set(metrics_of("policy/entropy_nats", [1.0, 2.0]).result()) == {"policy/entropy_nats"}


def test_values_with_a_gradient_are_detached() -> None:
    metrics = TokenMetrics()
    metrics.add("policy/nll_nats", torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, dtype=torch.bool))
    assert metrics.result() == {"policy/nll_nats": 1.0}


def test_a_metric_of_rows_is_averaged_over_the_rows_that_have_one() -> None:
    metrics = TokenMetrics()
    metrics.add("preference/accuracy", torch.tensor([1.0, math.nan, 0.0]), torch.tensor([True, False, True]))
    metrics.add("preference/accuracy", torch.tensor([1.0]), torch.tensor([True]))
    assert metrics.result() == {"preference/accuracy": pytest.approx(2 / 3)}
