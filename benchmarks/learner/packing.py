"""Padding, balance and time per trained token on a long-tailed length distribution."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.isolated import REPOSITORY
from benchmarks.learner.samples import long_tailed_lengths, write_samples
from benchmarks.learner.speed import timed_ranks
from rlhf.batches.packing import BatchPlan, WorkModel, plan_batch
from rlhf.batches.ragged import Sequences
from rlhf.config import Exaone4TinyModel
from rlhf.models import prepare_model
from rlhf.training.attention import padding_slots

SEQUENCES = 512
EXAONE_1_2B = SimpleNamespace(
    hidden_size=2048,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=4096,
    vocab_size=102_400,
)
"""The shape of EXAONE-4.0-1.2B, for the estimate of work; full attention in every layer."""


def run(*, quick: bool, baseline: Path | None, **_: Any) -> dict[str, Any]:
    """Plans for several layouts, and the seconds per trained token of the tiny model."""
    lengths = long_tailed_lengths(SEQUENCES)
    plans = [described(lengths, ranks, budget) for ranks in (1, 2, 4, 8) for budget in (4096, 8192, 16_384, 32_768)]
    figures: dict[str, float] = {
        "padding_share": max(plan["padding_share"] for plan in plans),
        "attention_padding_share": max(plan["attention_padding_share"] for plan in plans),
        "rank_imbalance": max(plan["rank_imbalance"] for plan in plans),
    }
    result: dict[str, Any] = {"plans": plans, "figures": figures}
    if baseline is not None:
        result["time"] = timed(baseline, quick)
        figures["packing_speedup"] = result["time"]["speedup"]
    return result


def described(lengths: np.ndarray, ranks: int, budget: int) -> dict[str, Any]:
    """Padding counts the tokens of idle micro-batches; attention's is what the CPU kernel adds inside its buckets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(int(offsets[-1]), np.int32)
    sequences, work = Sequences(tokens, tokens > 0, offsets), WorkModel.of(EXAONE_1_2B)
    plan = plan_batch(sequences, ranks, budget, work)
    parts = [part for rank in plan.ranks for part in rank]
    idle = 2 * sum(len(part) == 0 for part in parts)
    attention = sum(padding_slots(lengths[part].tolist()) for part in parts if len(part))
    total = int(lengths.sum())
    return {
        "ranks": ranks,
        "token_budget": budget,
        "micro_batches": plan.micro_batches,
        "padding_share": idle / (total + idle),
        "attention_padding_share": attention / (total + attention),
        "rank_imbalance": imbalance(plan, lengths, work),
        "fullest_micro_batch": max(int(lengths[part].sum()) for part in parts),
    }


def imbalance(plan: BatchPlan, lengths: np.ndarray, work: WorkModel) -> float:
    """Work of the slowest rank over the mean, micro-batch by micro-batch: ranks wait for each other in each of them."""
    cost = np.array([[work(lengths[part]).sum() for part in rank] for rank in plan.ranks])
    return float(cost.max(0).sum() / cost.mean(0).sum())


def timed(baseline: Path, quick: bool) -> dict[str, Any]:
    """The tiny EXAONE 4.0 with a context of 4,096 on two ranks, beside the older checkout."""
    count = 32 if quick else 96
    with tempfile.TemporaryDirectory() as folder:
        config = Exaone4TinyModel(kind="exaone4_tiny", max_context_tokens=4096)
        model = prepare_model(config, 0, Path(folder) / "model")
        samples = write_samples(Path(folder) / "samples.npz", long_tailed_lengths(count), 272, 0.3)
        case = {"model": str(model), "samples": str(samples), "context": 4096}
        ours = timed_ranks(case, "float32", REPOSITORY, 2, {"token_budget": 8192})
        older = timed_ranks(case, "float32", baseline, 2, {"micro_batch_size": 8})
    return {
        "speedup": older["seconds"] / ours["seconds"],
        "microseconds_per_trained_token": 1e6 * ours["seconds"] / ours["trained_tokens"],
        "older_microseconds_per_trained_token": 1e6 * older["seconds"] / older["trained_tokens"],
    }
