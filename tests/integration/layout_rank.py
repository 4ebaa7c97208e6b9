"""One learner rank of the layout test: trains three steps in every layout and prints losses and gradient norms."""

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

RANK, RANKS, PORT, MODEL = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rlhf.algorithms import Algorithm, build  # noqa: E402
from rlhf.algorithms.offline import OfflineAlgorithm  # noqa: E402
from rlhf.algorithms.online import OnlineAlgorithm  # noqa: E402
from rlhf.batches import (  # noqa: E402
    Batch,
    Rows,
    annotated,
    rollout_batch,
    supervised_batch,
    train_batch,
    with_reference,
)
from rlhf.config import AlgorithmConfig, RunConfig  # noqa: E402
from rlhf.samples import (  # noqa: E402
    PreferenceGroup,
    PreferencePair,
    PreferenceUnit,
    Prompt,
    RenderedPrompt,
    RewardValue,
    Sample,
    SampleGroup,
    ScoredGroup,
    TokenizedExample,
    VersionSpan,
)
from rlhf.training.batching import deal, micro_batch_count  # noqa: E402
from rlhf.training.rank import LearnerRank  # noqa: E402

STEPS = 3
K3 = {"coefficient": 0.1, "estimator": "k3", "placement": "loss"}
TO_GO = {"coefficient": 0.1, "estimator": "k1", "placement": "reward_to_go"}
UNPACKED = [(zero, size, False) for zero, size in product((1, 2, 3), (1, 2, 8))]
EVERY_LAYOUT = [*UNPACKED, (1, 8, True), (2, 3, True), (3, 2, True)]
FEW_LAYOUTS = [(1, 8, False), (3, 2, False), (2, 3, True)]
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, int, bool]]]] = {
    "sft": ({}, EVERY_LAYOUT),
    "grpo_icepop": ({}, EVERY_LAYOUT),
    "grpo": ({"kl": K3}, FEW_LAYOUTS),
    "gspo": ({"clip_low": 0.2, "clip_high": 0.2}, FEW_LAYOUTS),
    "agapo": ({"kl": TO_GO}, FEW_LAYOUTS),
    "dpo": ({}, FEW_LAYOUTS),
    "grouper": ({}, FEW_LAYOUTS),
}
"""Algorithm -> its hyper-parameters and the (ZeRO stage, micro-batch size, packing) it is trained with."""


def config(zero_stage: int, micro_batch_size: int, packing: bool) -> RunConfig:
    optimizer = {"learning_rate": 1e-3, "max_grad_norm": 0.5}
    return RunConfig.model_validate(
        {
            "experiment": "layout",
            "model": {"kind": "exaone4_tiny"},
            "data": {"train": {"kind": "procedural"}, "evaluation": {"kind": "procedural"}},
            "stages": {"sft": {"kind": "sft", "steps": STEPS, "optimizer": optimizer}},
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            "rollouts": {"temperature": 0.8},
            "training": {
                "ranks": RANKS,
                "zero_stage": zero_stage,
                "micro_batch_size": micro_batch_size,
                "packing": packing,
            },
        }
    )


def tokens(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    length = int(random.integers(6, 40))
    token_ids = random.integers(20, 250, length).astype(np.int32)
    return token_ids, np.arange(length) >= random.integers(1, length - 1)


def groups(random: np.random.Generator) -> list[ScoredGroup]:
    rendered = RenderedPrompt(Prompt("p", (), "", "math"), np.zeros(1, np.int32), False)
    found = []
    for number in range(4):
        samples = []
        for place in range(int(random.integers(2, 5))):
            token_ids, mask = tokens(random)
            logprobs = np.where(mask, -5.5 + 0.3 * random.standard_normal(len(mask)), 0).astype(np.float32)
            spans = (VersionSpan(0, 0, int(mask.sum())),)
            samples.append(Sample(f"{number}/{place}", token_ids, mask, logprobs, spans, "", "stop"))
        values = tuple(RewardValue(float(random.random()), 0.0, {}) for _ in samples)
        found.append(ScoredGroup(SampleGroup(str(number), rendered, tuple(samples), 0.0), values, 0.0))
    return found


def example(random: np.random.Generator) -> TokenizedExample:
    return TokenizedExample(*tokens(random))


def units(random: np.random.Generator, data: str) -> list[PreferenceUnit]:
    if data == "pairs":
        return [PreferencePair(str(n), example(random), example(random)) for n in range(5)]
    sizes = random.integers(2, 5, 3)
    return [PreferenceGroup(str(n), tuple(example(random) for _ in range(n)), tuple(random.random(n))) for n in sizes]


def share_of(rows: Rows, micro_batch_size: int) -> tuple[torch.Tensor, int]:
    """The rows of this rank, and how many micro-batches all ranks run."""
    return deal(rows, RANKS)[RANK], micro_batch_count(rows, RANKS, micro_batch_size)


def of_all_ranks(rows: Rows, share: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(rows.token_ids.shape)
    whole[share, : mine.shape[1]] = mine
    if RANKS > 1:
        torch.distributed.all_reduce(whole)
    return whole


def batch_of(rank: LearnerRank, algorithm: Algorithm, random: np.random.Generator, micro_batch_size: int) -> Batch:
    if isinstance(algorithm, OfflineAlgorithm):
        pairs = algorithm.batch(units(random, algorithm.needs.data))
        share, count = share_of(pairs, micro_batch_size)
        return with_reference(pairs, of_all_ranks(pairs, share, rank.logprobs(pairs.rows(share), count) - 0.1))
    if not isinstance(algorithm, OnlineAlgorithm):
        return supervised_batch([example(random) for _ in range(13)], algorithm.token_weights)
    raw = rollout_batch(groups(random), 0, 1.0)
    share, count = share_of(raw, micro_batch_size)
    proximal = of_all_ranks(raw, share, rank.logprobs(raw.rows(share), count))
    reference = None
    if algorithm.needs.reference_logprobs:
        reference = of_all_ranks(raw, share, rank.reference_logprobs(raw.rows(share), count))
    full = annotated(raw, proximal, reference)
    return train_batch(full, algorithm.advantages(full), algorithm.token_weights(full.loss_mask))


def train(rank: LearnerRank, chosen: AlgorithmConfig, micro_batch_size: int) -> list[tuple[float, float]]:
    algorithm, random, out = build(chosen.name, chosen.hyperparameters), np.random.default_rng(0), []
    for _ in range(STEPS):
        batch = batch_of(rank, algorithm, random, micro_batch_size)
        share, count = share_of(batch, micro_batch_size)
        report = rank.update(batch.rows(share), count)
        out.append((report.loss, report.grad_norm))
    return out


def main() -> None:
    torch.set_num_threads(1)
    joined = False
    runs = [(layout, name) for name, (_, layouts) in CASES.items() for layout in layouts]
    for (zero_stage, micro_batch_size, packing), name in runs:
        settings = config(zero_stage, micro_batch_size, packing)
        rank = LearnerRank(RANK, settings)
        if not joined:
            rank.join("127.0.0.1", PORT)
            joined = True
        chosen = AlgorithmConfig(name=name, **CASES[name][0])
        rank.load(MODEL, settings.stages["sft"].optimizer, STEPS, chosen)
        figures = train(rank, chosen, micro_batch_size)
        rank.close()
        if RANK == 0:
            print("RESULT", json.dumps([zero_stage, RANKS, micro_batch_size, packing, name, figures]), flush=True)


if __name__ == "__main__":
    main()
