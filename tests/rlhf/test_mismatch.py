from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.batches import TrainBatch
from rlhf.batches.padded import padded
from rlhf.batches.ragged import rollout_batch, train_sequences
from rlhf.metrics import DeviceMetrics
from rlhf.mismatch import mismatch_gaps, without_redundant_fresh
from rlhf.samples import ScoredGroup

MakeScored = Callable[..., ScoredGroup]


def batch_with_gaps(make_scored: MakeScored, gaps: list[list[float]], versions: list[int]) -> TrainBatch:
    """Completions of two tokens; `gaps` are rollout minus proximal log-probs."""
    groups = [make_scored((1.0,), completion_tokens=[2], version=version) for version in versions]
    sequences = rollout_batch(groups, version=3, correct_at=1.0).sequences.fetched()
    proximal = np.full(len(sequences.token_ids), 99.0, np.float32)  # the prompt means nothing
    proximal[sequences.loss_mask] = -0.5 - np.array(gaps, np.float32).ravel()
    none = np.ones(len(groups), np.float32)
    return padded(train_sequences(sequences, none, none, proximal_logprobs=proximal), torch.zeros(2 * len(groups)))


def figures(batch: TrainBatch) -> dict[str, float]:
    """As the learner gathers them."""
    metrics = DeviceMetrics()
    for values, mask in mismatch_gaps(batch).values():
        metrics.add(values, mask)
    return metrics.sums().result()


def staleness(versions: list[int]) -> Tensor:
    return 3 - torch.tensor(versions)


def test_every_figure_by_hand(make_scored: MakeScored) -> None:
    found = figures(batch_with_gaps(make_scored, [[0.1, -0.2], [0.0, 0.5]], [3, 3]))
    by_hand = {"kl_nats": 0.1, "abs_gap_nats": 0.2, "abs_gap_nats_max": 0.5}
    wanted = {f"{prefix}/{name}": value for prefix in ("mismatch", "mismatch/fresh") for name, value in by_hand.items()}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_fresh_samples_are_given_alone_where_others_are_stale(make_scored: MakeScored) -> None:
    versions = [3, 2]
    found = figures(batch_with_gaps(make_scored, [[0.1, -0.3], [0.5, 0.7]], versions))
    assert found["mismatch/fresh/kl_nats"] == pytest.approx(-0.1, abs=1e-6)
    assert found["mismatch/fresh/abs_gap_nats"] == pytest.approx(0.2, abs=1e-6)
    assert found["mismatch/fresh/abs_gap_nats_max"] == pytest.approx(0.3, abs=1e-6)
    assert found["mismatch/kl_nats"] == pytest.approx(0.25, abs=1e-6)
    assert found["mismatch/abs_gap_nats_max"] == pytest.approx(0.7, abs=1e-6)
    assert without_redundant_fresh(found, staleness(versions)) == found


@pytest.mark.parametrize("versions", [[3, 3], [2, 2]])
def test_they_are_left_out_where_all_or_none_are_fresh(make_scored: MakeScored, versions: list[int]) -> None:
    found = figures(batch_with_gaps(make_scored, [[0.1, 0.1], [0.5, 0.7]], versions))
    shown = without_redundant_fresh(found | {"policy/ratio": 1.0}, staleness(versions))
    assert shown.keys() == {
        "mismatch/kl_nats",
        "mismatch/abs_gap_nats",
        "mismatch/abs_gap_nats_max",
        "policy/ratio",
    }


def test_nan_off_the_mask_is_not_seen(make_scored: MakeScored) -> None:
    batch = batch_with_gaps(make_scored, [[0.1, 0.1]], [3])
    dirty = replace(batch, proximal_logprobs=batch.proximal_logprobs.masked_fill(~batch.loss_mask, math.nan))
    assert figures(dirty) == figures(batch)


def test_the_gaps_carry_no_gradient(make_scored: MakeScored) -> None:
    batch = batch_with_gaps(make_scored, [[0.1, 0.1]], [3])
    batch = replace(batch, proximal_logprobs=batch.proximal_logprobs.requires_grad_())
    gaps = [table for values, _ in mismatch_gaps(batch).values() for table in values.values()]
    assert not any(table.requires_grad for table in gaps)
