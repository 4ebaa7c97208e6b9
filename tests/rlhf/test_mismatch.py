from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rlhf.batches import AnnotatedBatch, annotated, rollout_batch
from rlhf.mismatch import mismatch_metrics
from rlhf.samples import ScoredGroup


def batch_with_gaps(make_scored: Callable[..., ScoredGroup], gaps: list[list[float]], versions: list[int]):
    """Completions of two tokens; `gaps` are rollout minus proximal log-probs."""
    groups = [make_scored((1.0,), completion_tokens=[2], version=version) for version in versions]
    batch = rollout_batch(groups, version=3, correct_at=1.0)
    proximal = batch.rollout_logprobs.clone()
    proximal[:, 2:] -= torch.tensor(gaps)
    proximal[:, :2] = 99.0  # the prompt means nothing
    return annotated(batch, proximal)


def test_every_figure_by_hand(make_scored: Callable[..., ScoredGroup]) -> None:
    found = mismatch_metrics(batch_with_gaps(make_scored, [[0.1, -0.2], [0.0, 0.5]], [3, 3]))
    assert found == pytest.approx(
        {
            "mismatch/kl_nats": 0.1,
            "mismatch/abs_gap_nats": 0.2,
            "mismatch/abs_gap_nats_max": 0.5,
        },
        abs=1e-6,
    )


def test_fresh_samples_are_given_alone_where_others_are_stale(make_scored: Callable[..., ScoredGroup]) -> None:
    found = mismatch_metrics(batch_with_gaps(make_scored, [[0.1, 0.1], [0.5, 0.7]], [3, 2]))
    assert found["mismatch/fresh/kl_nats"] == pytest.approx(0.1, abs=1e-6)
    assert found["mismatch/kl_nats"] == pytest.approx(0.35, abs=1e-6)


@pytest.mark.parametrize("versions", [[3, 3], [2, 2]])
def test_they_are_left_out_where_all_or_none_are_fresh(
    make_scored: Callable[..., ScoredGroup], versions: list[int]
) -> None:
    found = mismatch_metrics(batch_with_gaps(make_scored, [[0.1, 0.1], [0.5, 0.7]], versions))
    assert not any("fresh" in name for name in found)


def test_nan_off_the_mask_is_not_seen(make_scored: Callable[..., ScoredGroup]) -> None:
    batch: AnnotatedBatch = batch_with_gaps(make_scored, [[0.1, 0.1]], [3])
    dirty = replace(batch, proximal_logprobs=batch.proximal_logprobs.masked_fill(~batch.loss_mask, math.nan))
    assert mismatch_metrics(dirty) == mismatch_metrics(batch)
