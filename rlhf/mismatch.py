"""How far the engine that sampled and the learner that trains disagree on the sampled tokens."""

from __future__ import annotations

import torch

from rlhf.batches import AnnotatedBatch


def mismatch_metrics(batch: AnnotatedBatch) -> dict[str, float]:
    """Of rollout versus proximal log-probs over all completion tokens of all ranks, before any truncation.

    `mismatch/kl_nats` is the mean of rollout minus proximal (the k1 estimate of KL(rollout || proximal)). Fresh samples
    (staleness 0) are also given alone: there only numerics can differ, so what they lack to the whole is the change of
    the policy.
    """
    out = _of_tokens(batch.loss_mask, batch, "mismatch")
    fresh = batch.loss_mask & (batch.staleness == 0)[:, None]
    if bool(fresh.any()) and not bool(fresh[batch.loss_mask].all()):
        out |= _of_tokens(fresh, batch, "mismatch/fresh")
    return out


def _of_tokens(mask: torch.Tensor, batch: AnnotatedBatch, prefix: str) -> dict[str, float]:
    gap = (batch.rollout_logprobs - batch.proximal_logprobs)[mask].double()
    return {
        f"{prefix}/kl_nats": gap.mean().item(),
        f"{prefix}/abs_gap_nats": gap.abs().mean().item(),
        f"{prefix}/abs_gap_nats_max": gap.abs().max().item(),
    }
