"""One learner rank in a process of its own, timed: of this checkout, or of an older one that PYTHONPATH names.

    python rank_process.py '{"rank": 0, "ranks": 1, ...}'

Imports nothing of the benchmarks, so that an older checkout needs to have none. A step is what a rollout step asks of
the learner: annotation and one optimiser step over given samples.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

ALGORITHM = {"name": "grpo_icepop"}
OPTIMIZER = {"learning_rate": 1e-6}


@dataclass(frozen=True)
class Task:
    """One measurement. `training` are settings of that section, `samples` a file that `write_samples` wrote."""

    rank: int
    ranks: int
    port: int
    threads: int
    model: str
    dtype: str
    context: int
    samples: str
    training: dict[str, Any]
    steps: int
    warm_up: int
    device: str = "cpu"


def run_config(task: Task) -> Any:
    from rlhf.config import RunConfig

    return RunConfig.model_validate(
        {
            "experiment": "benchmark",
            "model": {
                "kind": "hf",
                "path": task.model,
                "dtype": task.dtype,
                "max_context_tokens": task.context,
            },
            "data": {"train": {"kind": "procedural"}, "evaluation": {"kind": "procedural"}},
            "stages": {"rl": {"kind": "rl", "steps": 1000, "optimizer": OPTIMIZER}},
            "algorithm": ALGORITHM,
            "rewards": {"components": {"math": {}}},
            "training": {"ranks": task.ranks, **task.training},
            "cluster": {"device": task.device},
        }
    )


def step_of_this_api(task: Task, config: Any) -> Callable[[], int]:
    """Since batches are ragged. Groups of four samples follow each other in the file."""
    from rlhf.algorithms.grpo_icepop import GrpoIcePop
    from rlhf.batches.packing import WorkModel, plan_batch
    from rlhf.batches.ragged import RolloutSequences, ScoredSamples
    from rlhf.config import AlgorithmConfig
    from rlhf.models import policy_config
    from rlhf.protocols import StageSetup
    from rlhf.training.rank import LoadedRank, join

    join(task.rank, config, "127.0.0.1", task.port)
    loaded = LoadedRank(task.rank, config, Path(task.model))
    chosen = AlgorithmConfig(**ALGORITHM)
    setup = StageSetup(Path(task.model), config.stages["rl"].optimizer, 1000, chosen)
    stage, algorithm = loaded.begin_stage(setup), GrpoIcePop()
    stored, work = np.load(task.samples), WorkModel.of(policy_config(task.model))
    offsets, number = stored["offsets"], np.arange(len(stored["prompt_tokens"]))
    lengths = np.diff(offsets)
    mask = np.concatenate([np.arange(n) >= p for n, p in zip(lengths, stored["prompt_tokens"], strict=True)])
    sequences = RolloutSequences(
        token_ids=stored["token_ids"],
        loss_mask=mask,
        offsets=offsets,
        rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        sample_index=number,
        staleness=np.zeros_like(number),
    )
    samples = ScoredSamples(
        rewards=torch.from_numpy(np.random.default_rng(0).random(len(number), np.float32)),
        correct=torch.zeros(len(number), dtype=torch.bool),
        group_index=torch.from_numpy(number // 4),
        completion_tokens=torch.from_numpy(lengths - stored["prompt_tokens"]),
        staleness=torch.zeros(len(number), dtype=torch.int64),
    )

    def step() -> int:
        plan = plan_batch(sequences, task.ranks, config.token_budget, work)
        index = plan.index[task.rank]
        [kl] = stage.online.hold([plan.shares(sequences)[task.rank]])
        advantages = algorithm.advantages(samples, torch.zeros(len(samples)))
        weights = algorithm.sample_weights(samples.completion_tokens)
        assert len(kl) == len(index)
        return stage.online.update(0, advantages.numpy()[index], weights.numpy()[index]).trained_tokens

    return step


def groups_of_padded_api(path: str) -> list[Any]:
    """The samples of the file as scored groups of four."""
    names = import_module("rlhf.samples")
    stored, random = np.load(path), np.random.default_rng(0)
    bounds = zip(stored["offsets"][:-1], stored["offsets"][1:], stored["prompt_tokens"], strict=True)
    samples = []
    for number, (start, end, prompt) in enumerate(bounds):
        mask = np.arange(end - start) >= prompt
        logprobs = np.where(mask, -1.0, 0.0).astype(np.float32)
        spans = (names.VersionSpan(0, 0, int(mask.sum())),)
        tokens = stored["token_ids"][start:end]
        samples.append(names.Sample(str(number), tokens, mask, logprobs, spans, "", "stop"))
    rendered = names.RenderedPrompt(names.Prompt("p", (), "", "math"), np.zeros(1, np.int32), False)
    found = []
    for start in range(0, len(samples), 4):
        chosen = tuple(samples[start : start + 4])
        values = tuple(names.RewardValue(float(random.random()), 0.0, {}) for _ in chosen)
        found.append(names.ScoredGroup(names.SampleGroup(str(start), rendered, chosen, 0.0), values, 0.0))
    return found


def step_of_padded_api(task: Task, config: Any) -> Callable[[], int]:
    """Before batches were ragged (up to ebd30e7). Its names are not in this tree, so they are looked up as text."""
    algorithms, batches = import_module("rlhf.algorithms"), import_module("rlhf.batches")
    batching = import_module("rlhf.training.batching")
    rank = import_module("rlhf.training.rank").LearnerRank(task.rank, config)
    chosen = import_module("rlhf.config").AlgorithmConfig(**ALGORITHM)
    rank.join("127.0.0.1", task.port)
    rank.load(Path(task.model), config.stages["rl"].optimizer, 1000, chosen)
    scored, algorithm = groups_of_padded_api(task.samples), algorithms.build(chosen.name, chosen.hyperparameters)

    def step() -> int:
        batch = batches.rollout_batch(scored, 0, 1.0)
        count = batching.micro_batch_count(batch, task.ranks, config.training.micro_batch_size)
        share = batching.deal(batch, task.ranks)[task.rank]
        mine = rank.logprobs(batch.rows(share), count)
        proximal = torch.zeros(batch.token_ids.shape)
        proximal[share, : mine.shape[1]] = mine
        if task.ranks > 1:
            torch.distributed.all_reduce(proximal)
        full = batches.annotated(batch, proximal)
        weights = algorithm.token_weights(full.loss_mask)
        whole = batches.train_batch(full, algorithm.advantages(full), weights)
        return rank.update(whole.rows(share), count).trained_tokens

    return step


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    if task.device == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(task.ranks)}
    torch.set_num_threads(task.threads)
    config = run_config(task)
    ragged = importlib.util.find_spec("rlhf.batches.ragged") if is_package("rlhf.batches") else None
    step = (step_of_this_api if ragged else step_of_padded_api)(task, config)
    for _ in range(task.warm_up):
        step()
    seconds, tokens = [], 0
    for _ in range(task.steps):
        started = time.perf_counter()
        tokens = step()
        seconds.append(time.perf_counter() - started)
    result: dict[str, Any] = {"seconds": seconds, "trained_tokens": tokens}
    if task.device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / (1 << 30)
    print("RESULT " + json.dumps(result), flush=True)


def is_package(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.submodule_search_locations is not None


if __name__ == "__main__":
    main()
