"""Disagreement of the engine that sampled and the learner that trains on the sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.batches import TrainBatch

MISMATCH = "mismatch"
FRESH = "mismatch/fresh"


@torch.no_grad()
def mismatch_gaps(batch: TrainBatch) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Prefix -> (metrics [B, T], mask [B, T]) of rollout against proximal log-probs, before any truncation.

    The mean of `kl_nats`, rollout minus proximal, is the k1 estimate of KL(rollout || proximal). Fresh samples
    (staleness 0) are also given alone: there only numerics can differ, so the difference from the overall figure is
    policy drift.
    """
    gap = batch.rollout_logprobs - batch.proximal_logprobs
    fresh = batch.loss_mask & (batch.staleness == 0)[:, None]
    return {
        MISMATCH: ({f"{MISMATCH}/kl_nats": gap, f"{MISMATCH}/abs_gap_nats": gap.abs()}, batch.loss_mask),
        FRESH: ({f"{FRESH}/kl_nats": gap, f"{FRESH}/abs_gap_nats": gap.abs()}, fresh),
    }


def without_redundant_fresh(metrics: dict[str, float], staleness: Tensor) -> dict[str, float]:
    """The metrics of a step less those of fresh samples, unless it has both fresh and stale samples."""
    fresh = staleness == 0
    if bool(torch.any(fresh)) and not bool(torch.all(fresh)):
        return metrics
    return {name: value for name, value in metrics.items() if not name.startswith(f"{FRESH}/")}
