"""One learner rank of the resume test: trains, saves its state, and goes on; or loads that state and goes on.

python resume_rank.py RANK RANKS PORT MODEL DIRECTORY (save | load)
"""

import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

RANK, RANKS, PORT = map(int, sys.argv[1:4])
MODEL, DIRECTORY, WHAT = Path(sys.argv[4]), Path(sys.argv[5]), sys.argv[6]
os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rlhf.batches.packing import WorkModel, plan_batch  # noqa: E402
from rlhf.batches.ragged import supervised_sequences  # noqa: E402
from rlhf.config import AlgorithmConfig, RunConfig  # noqa: E402
from rlhf.protocols import StageSetup  # noqa: E402
from rlhf.samples import TokenizedExample  # noqa: E402
from rlhf.training.rank import LoadedRank, StageRank, join  # noqa: E402

BEFORE, AFTER = 3, 2
LAYOUTS = list(product((1, 2, 3), ("float32", "bfloat16")))


def config(zero_stage: int, dtype: str) -> RunConfig:
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 2, "schedule": "cosine", "min_learning_rate": 1e-4}
    return RunConfig.model_validate(
        {
            "experiment": "resume",
            "model": {"kind": "hf", "path": str(MODEL), "dtype": dtype, "max_context_tokens": 256},
            "data": {"train": {"kind": "procedural"}, "evaluation": {"kind": "procedural"}},
            "stages": {"sft": {"kind": "sft", "steps": BEFORE + AFTER, "optimizer": optimizer}},
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            "training": {"ranks": RANKS, "zero_stage": zero_stage},
        }
    )


def train(stage: StageRank, step: int) -> float:
    random = np.random.default_rng(step)
    lengths = random.integers(8, 60, 12)
    examples = [TokenizedExample(random.integers(20, 250, n).astype(np.int32), np.arange(n) > 2) for n in lengths]
    batch = supervised_sequences(examples, lambda count: 1.0 / count)
    plan = plan_batch(batch, RANKS, 200, WorkModel())
    return stage.learner.update(plan.shares(batch)[RANK]).loss


def main() -> None:
    torch.set_num_threads(1)
    join(RANK, config(1, "float32"), "127.0.0.1", PORT)
    for zero_stage, dtype in LAYOUTS:
        settings, folder = config(zero_stage, dtype), DIRECTORY / f"{zero_stage}-{dtype}"
        rank = LoadedRank(RANK, settings, MODEL)
        chosen = AlgorithmConfig(name="sft")
        setup = StageSetup(MODEL, settings.stages["sft"].optimizer, BEFORE + AFTER, chosen)
        if WHAT == "save":
            stage = rank.begin_stage(setup)
            for step in range(BEFORE):
                train(stage, step)
            rank.save_state(folder)
        else:
            rank.load_state(folder)
            stage = rank.begin_stage(replace(setup, first_step=BEFORE))
        losses = [train(stage, BEFORE + step) for step in range(AFTER)]
        print("RESULT", json.dumps([zero_stage, dtype, losses, rank.engine.master_digests()]), flush=True)
        rank.close()


if __name__ == "__main__":
    main()
