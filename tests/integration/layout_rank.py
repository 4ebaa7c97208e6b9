"""One learner rank of the layout test: trains three steps in every layout and prints losses and gradient norms."""

import json
import os
import sys
from itertools import product
from pathlib import Path

RANK, RANKS, PORT, MODEL = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rlhf.algorithms import build  # noqa: E402
from rlhf.batches import annotated, rollout_batch, supervised_batch, train_batch  # noqa: E402
from rlhf.config import RunConfig  # noqa: E402
from rlhf.samples import (  # noqa: E402
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


def config(zero_stage: int, micro_batch_size: int) -> RunConfig:
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
            "training": {"ranks": RANKS, "zero_stage": zero_stage, "micro_batch_size": micro_batch_size},
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


def train(rank: LearnerRank, algorithm_name: str, micro_batch_size: int) -> list[tuple[float, float]]:
    algorithm, random, out = build(algorithm_name, {}), np.random.default_rng(0), []
    for _ in range(STEPS):
        if algorithm_name == "sft":
            batch = supervised_batch([TokenizedExample(*tokens(random)) for _ in range(13)], algorithm.token_weights)
        else:
            raw = rollout_batch(groups(random), 0)
            shares, count = deal(raw.lengths, RANKS), micro_batch_count(len(raw), RANKS, micro_batch_size)
            mine = rank.logprobs(raw.rows(shares[RANK]), count)
            whole = torch.zeros(raw.token_ids.shape)
            whole[shares[RANK], : mine.shape[1]] = mine
            if RANKS > 1:
                torch.distributed.all_reduce(whole)
            full = annotated(raw, whole)
            batch = train_batch(full, algorithm.advantages(full), algorithm.token_weights(full.loss_mask))
        shares, count = deal(batch.lengths, RANKS), micro_batch_count(len(batch), RANKS, micro_batch_size)
        report = rank.update(batch.rows(shares[RANK]), count)
        out.append((report.loss, report.grad_norm))
    return out


def main() -> None:
    torch.set_num_threads(1)
    joined = False
    for zero_stage, micro_batch_size, name in product((1, 2, 3), (1, 2, 8), ("sft", "grpo_icepop")):
        settings = config(zero_stage, micro_batch_size)
        rank = LearnerRank(RANK, settings)
        if not joined:
            rank.join("127.0.0.1", PORT)
            joined = True
        rank.load(MODEL, settings.stages["sft"].optimizer, STEPS, build(name, {}))
        figures = train(rank, name, micro_batch_size)
        rank.close()
        if RANK == 0:
            print("RESULT", json.dumps([zero_stage, RANKS, micro_batch_size, name, figures]), flush=True)


if __name__ == "__main__":
    main()
