"""One learner rank of the layout test: trains three steps in every layout and prints losses and gradient norms."""

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

RANK, RANKS, PORT, MODEL, DEVICE = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
os.environ |= {"LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
if DEVICE == "cpu":
    os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rlhf.algorithms import Algorithm, build  # noqa: E402
from rlhf.algorithms.offline import OfflineAlgorithm  # noqa: E402
from rlhf.algorithms.online import OnlineAlgorithm  # noqa: E402
from rlhf.batches.packing import BatchPlan, Share, WorkModel, plan_batch  # noqa: E402
from rlhf.batches.ragged import (  # noqa: E402
    RolloutBatch,
    Sequences,
    rollout_batch,
    supervised_sequences,
    train_sequences,
    with_reference,
)
from rlhf.config import AlgorithmConfig, RunConfig  # noqa: E402
from rlhf.protocols import StageSetup  # noqa: E402
from rlhf.samples import (  # noqa: E402
    GroupTokens,
    InMemory,
    PreferenceGroup,
    PreferencePair,
    PreferenceUnit,
    Prompt,
    RewardValue,
    Sample,
    SampleGroup,
    ScoredGroup,
    TextGroup,
    TokenizedExample,
    VersionSpan,
)
from rlhf.training.learner import RankReport  # noqa: E402
from rlhf.training.rank import LoadedRank, StageRank, join  # noqa: E402

STEPS = 3
K3 = {"coefficient": 0.1, "estimator": "k3", "placement": "loss"}
IN_REWARD = {"coefficient": 0.1, "estimator": "k1", "placement": "reward"}
TO_GO = {"coefficient": 0.1, "estimator": "k1", "placement": "reward_to_go"}
ONE_BY_ONE, FEW, ALL = 1, 60, 4096
"""Token budgets: every sequence alone, some to a micro-batch, all in one."""
Layout = tuple[int, int, bool]
"""(ZeRO stage, token budget, proximal log-probs recomputed where the learner could use its own)"""
BUDGETS = [(zero, budget, False) for zero, budget in product((1, 2, 3), (ONE_BY_ONE, FEW, ALL))]
RECOMPUTED = [(1, FEW, True), (3, ALL, True)]
FEW_LAYOUTS = [(1, ONE_BY_ONE, False), (3, FEW, False), (2, ALL, False)]
CASES: dict[str, tuple[dict[str, Any], list[Layout]]] = {
    "sft": ({}, FEW_LAYOUTS),
    "grpo_icepop": ({}, [*BUDGETS, *RECOMPUTED]),
    "grpo": ({"kl": K3}, [*FEW_LAYOUTS, *RECOMPUTED]),
    "rloo": ({"kl": IN_REWARD}, FEW_LAYOUTS),
    "gspo": ({"clip_low": 0.2, "clip_high": 0.2}, FEW_LAYOUTS),
    "agapo": ({"kl": TO_GO}, FEW_LAYOUTS),
    "dpo": ({}, FEW_LAYOUTS),
    "grouper": ({}, FEW_LAYOUTS),
}
"""Algorithm -> its hyper-parameters and the layouts it is trained in."""


def config(zero_stage: int, offload_reference: bool = False) -> RunConfig:
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
            "cluster": {"device": DEVICE},
            "training": {"ranks": RANKS, "zero_stage": zero_stage, "offload_reference": offload_reference},
        }
    )


def tokens(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    length = int(random.integers(6, 40))
    token_ids = random.integers(20, 250, length).astype(np.int32)
    return token_ids, np.arange(length) >= random.integers(1, length - 1)


def groups(random: np.random.Generator) -> list[ScoredGroup]:
    found = []
    for number in range(4):
        made = [tokens(random) for _ in range(int(random.integers(2, 5)))]
        mask = np.concatenate([one for _, one in made])
        stored = GroupTokens(
            token_ids=np.concatenate([token_ids for token_ids, _ in made]),
            loss_mask=mask,
            rollout_logprobs=np.where(mask, -5.5 + 0.3 * random.standard_normal(len(mask)), 0).astype(np.float32),
            offsets=np.concatenate([[0], np.cumsum([len(one) for _, one in made])]),
        )
        samples = tuple(sample(f"{number}/{place}", one) for place, (_, one) in enumerate(made))
        values = tuple(RewardValue(float(random.random()), 0.0, {}) for _ in samples)
        prompt = Prompt("p", (), "", "math")
        text = TextGroup(str(number), prompt, False, 0, ())
        group = SampleGroup(str(number), prompt, False, samples, 0.0, InMemory(stored, text))
        found.append(ScoredGroup(group, values, 0.0))
    return found


def sample(sample_id: str, mask: np.ndarray) -> Sample:
    completion = int(mask.sum())
    return Sample(sample_id, len(mask) - completion, completion, (VersionSpan(0, 0, completion),), "stop")


def example(random: np.random.Generator) -> TokenizedExample:
    return TokenizedExample(*tokens(random))


def units(random: np.random.Generator, data: str) -> list[PreferenceUnit]:
    if data == "pairs":
        return [PreferencePair(str(n), example(random), example(random)) for n in range(5)]
    sizes = random.integers(2, 5, 3)
    return [PreferenceGroup(str(n), tuple(example(random) for _ in range(n)), tuple(random.random(n))) for n in sizes]


def of_all_ranks(plan: BatchPlan, sequences: Sequences, mine: np.ndarray) -> np.ndarray:
    """What the ranks found for their tokens [S_rank], in the order of all `sequences` [S]."""
    index = plan.index[RANK]
    whole = torch.zeros(len(sequences.token_ids))
    for number, values in zip(index, sequences.select(index).per_sequence(mine), strict=True):
        whole[sequences.offsets[number] : sequences.offsets[number + 1]] = torch.from_numpy(values)
    if RANKS > 1:
        torch.distributed.all_reduce(whole)
    return whole.numpy()


def preference_step(stage: StageRank, algorithm: OfflineAlgorithm, random: np.random.Generator, budget: int) -> Any:
    batch = algorithm.batch(units(random, algorithm.needs.data))
    plan = plan_batch(batch, RANKS, budget, WorkModel())
    mine = stage.learner.logprobs(plan.shares(batch)[RANK])
    return with_reference(batch, of_all_ranks(plan, batch, mine) - 0.1 * batch.loss_mask)


def online_step(
    stage: StageRank, algorithm: OnlineAlgorithm, batch: RolloutBatch, budget: int, recomputed: bool
) -> RankReport:
    """One rollout step with one update, as the group of all ranks does it."""
    sequences = batch.sequences.fetched()
    plan = plan_batch(sequences, RANKS, budget, WorkModel())
    share = plan.shares(sequences)[RANK]
    [kl] = stage.online.hold([share])
    total = torch.zeros(len(sequences))
    total[plan.index[RANK]] = torch.from_numpy(kl)
    if RANKS > 1:
        torch.distributed.all_reduce(total)
    advantages = algorithm.advantages(batch.samples, total)
    weights = algorithm.sample_weights(batch.samples.completion_tokens)
    mine = (advantages.numpy()[plan.index[RANK]], weights.numpy()[plan.index[RANK]])
    if not recomputed:
        return stage.online.update(0, *mine)
    held = stage.online.held(0)
    explicit = train_sequences(
        share.batch,
        *mine,
        proximal_logprobs=stage.learner.logprobs(share),
        reference_logprobs=held.reference_logprobs,
    )
    return stage.learner.update(Share(explicit, share.counts))


def step(
    stage: StageRank, algorithm: Algorithm, random: np.random.Generator, budget: int, recomputed: bool
) -> RankReport:
    if isinstance(algorithm, OnlineAlgorithm):
        return online_step(stage, algorithm, rollout_batch(groups(random), 0, 1.0), budget, recomputed)
    if isinstance(algorithm, OfflineAlgorithm):
        batch = preference_step(stage, algorithm, random, budget)
    else:
        batch = supervised_sequences([example(random) for _ in range(13)], algorithm.sample_weights)
    plan = plan_batch(batch, RANKS, budget, WorkModel())
    return stage.learner.update(plan.shares(batch)[RANK])


def train(stage: StageRank, algorithm: Algorithm, budget: int, recomputed: bool) -> list[tuple[float, float]]:
    random = np.random.default_rng(0)
    reports = [step(stage, algorithm, random, budget, recomputed) for _ in range(STEPS)]
    return [(report.loss, report.grad_norm) for report in reports]


def main() -> None:
    torch.set_num_threads(1)
    join(RANK, config(1), "127.0.0.1", PORT)
    runs = [(layout, name) for name, (_, layouts) in CASES.items() for layout in layouts]
    for (zero_stage, budget, recomputed), name in runs:
        settings = config(zero_stage, offload_reference=zero_stage == 2)
        rank = LoadedRank(RANK, settings, MODEL)
        chosen = AlgorithmConfig(name=name, **CASES[name][0])
        stage = rank.begin_stage(StageSetup(MODEL, settings.stages["sft"].optimizer, STEPS, chosen))
        figures = train(stage, build(name, CASES[name][0]), budget, recomputed)
        stage.close()
        rank.close()
        if RANK == 0:
            print("RESULT", json.dumps([zero_stage, RANKS, budget, recomputed, name, figures]), flush=True)


if __name__ == "__main__":
    main()
