"""The whole loop beside its halves: what rollouts and learner do alone, and what they do together.

One stack of real engines, learners and rewards; each measurement is a stage over it, with the same cores per role: the
engine's processes have one to themselves, the learner has the other, which the driver and the graders share.

    rollouts alone      steps are taken and not trained
    learner alone       one step's samples are trained again and again
    together            the controller's loop, at staleness 1 and 0
    refill              steps are taken and not trained, while three of five groups are filtered

`overlap` is trained tokens per second together over the slower half alone. `refill` is the time that steps take with
the filter over the time that their sampled tokens take without one.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from benchmarks.isolated import isolated
from rewards.client import RewardClient
from rewards.worker import spawn
from rlhf.algorithms import build
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.batches.ragged import rollout_batch
from rlhf.cluster import Cluster, roles
from rlhf.config import AlgorithmConfig, RlStage, RunConfig
from rlhf.controller import Controller, StepRecord, optimiser_steps
from rlhf.ledger import Ledger
from rlhf.models import load_tokenizer, prepare_model
from rlhf.protocols import LearnerGroup, StageSetup
from rlhf.samples import ScoredGroup
from rlhf.selection import Rejected
from rlhf.training.worker import RayLearnerGroup
from rlhf.weight_sync.publisher import WeightPublisher
from rollouts.buffer import Limits, StalenessBuffer
from rollouts.dispatcher import Dispatcher, TrainingRollouts
from rollouts.engine import Sampling
from rollouts.generator import GroupRequest
from rollouts.prompts import PromptStream
from rollouts.rendering import Renderer
from rollouts.sources import Sources
from rollouts.worker import RayEngine, RayEngines

CASES: dict[str, dict[str, Any]] = {
    "tiny": {"model": {"kind": "exaone4_tiny"}, "prompts": 32, "group_size": 8, "tokens": 40, "context": 128},
    "135m": {"model": {"kind": "smollm2_135m"}, "prompts": 4, "group_size": 4, "tokens": 96, "context": 256},
}
STEPS = {"tiny": 12, "135m": 4}
FILTERED = 0.6


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """Figures of both models; the plain names are those of SmolLM2-135M where it ran."""
    names = ("tiny",) if quick else tuple(CASES)
    rows = {name: isolated(measure, name) for name in names}
    figures: dict[str, float] = {}
    for name, row in rows.items():
        suffix = "" if name == names[-1] else f"_{name}"
        figures |= {f"{key}{suffix}": row[key] for key in ("overlap_async", "overlap_sync", "refill_ratio")}
        figures[f"refill_ratio_sync{suffix}"] = row["refill_ratio_sync"]
    return {"rows": rows, "figures": figures}


def config(name: str, staleness: int) -> RunConfig:
    case, source = CASES[name], {"kind": "procedural"}
    stage = {"kind": "rl", "steps": 1000, "prompts_per_step": case["prompts"], "optimizer": {"learning_rate": 1e-7}}
    return RunConfig.model_validate(
        {
            "experiment": "benchmark",
            "model": {**case["model"], "max_context_tokens": case["context"]},
            "data": {"train": source, "evaluation": source},
            "stages": {"rl": stage},
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            "rollouts": {
                "group_size": case["group_size"],
                "max_completion_tokens": case["tokens"],
                "max_staleness": staleness,
            },
            "training": {"ranks": 1},
        }
    )


def measure(name: str) -> dict[str, float]:
    """All measurements of one model; runs in its own process."""
    with Stack(config(name, 1)) as stack:
        steps = STEPS[name]
        stack.rollouts_alone(1, steps)  # warms up
        sampled_per_s = stack.rollouts_alone(1, steps)["tokens_per_s"]
        trained_per_s = stack.learner_alone(steps)
        together = {staleness: stack.together(staleness, steps) for staleness in (1, 0)}
        refilled = {staleness: stack.rollouts_alone(staleness, steps, FILTERED) for staleness in (1, 0)}
    slower = min(sampled_per_s, trained_per_s)
    return {
        "rollout_tokens_per_s": sampled_per_s,
        "learner_tokens_per_s": trained_per_s,
        "async_tokens_per_s": together[1],
        "sync_tokens_per_s": together[0],
        "overlap_async": together[1] / slower,
        "overlap_sync": together[0] / slower,
        "refill_ratio": sampled_per_s / refilled[1]["tokens_per_s"],
        "refill_ratio_sync": sampled_per_s / refilled[0]["tokens_per_s"],
    }


def keep_to(_: Any, cores: list[int]) -> None:
    """Bind all threads of this process and of its descendants to some cores. An actor passes itself first."""
    torch.set_num_threads(len(cores))
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)


class Stack:
    """Everything that an RL stage needs, started once."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._exit = ExitStack()
        self._stages = 0

    def __enter__(self) -> Stack:
        config, keep = self._config, self._exit
        folder = Path(keep.enter_context(tempfile.TemporaryDirectory()))
        self._folder, self._model = folder, prepare_model(config.model, 0, folder / "model")
        tokenizer = load_tokenizer(self._model, trust_remote_code=False)
        self._renderer = Renderer(tokenizer, config.max_prompt_tokens, config.model.max_context_tokens)
        self._sources = Sources(config)
        cluster = keep.enter_context(Cluster(config, folder))
        graders = [
            grader
            for role in roles(config)
            if role.name.startswith("reward")
            for grader in spawn(config.rewards, 1, cluster.options(role, {}))
        ]
        engines = RayEngines(cluster, config, self._model, folder)
        self._learners = RayLearnerGroup(cluster, config, folder)
        self._learners.join()
        engines.wait_until_started()
        keep.callback(engines.shutdown)
        self._learners.load_model(self._model)
        self._learners.connect(engines.actors)
        scoring, rollouts = RewardClient(graders, folder), config.rollouts
        handles = [RayEngine(actor) for actor in engines.actors]
        self._dispatcher = Dispatcher(handles, scoring.score, 600.0, rollouts.max_concurrent_samples)
        keep.callback(self._dispatcher.close)
        probe = [list(range(20, 52))] * 4
        self._publisher = WeightPublisher(self._learners, engines, probe, config.attestation_limits)
        self._publisher.publish()
        stage = config.stages["rl"]
        assert isinstance(stage, RlStage)
        self._learners.begin_stage(StageSetup(self._model, stage.optimizer, 1000, AlgorithmConfig(name="grpo_icepop")))
        engine_core, *others = sorted(os.sched_getaffinity(0))
        keep_to(None, others)  # Ray's processes descend from this one, and all workers from Ray's
        ray.get([worker.__ray_call__.remote(keep_to, others) for worker in self._learners._workers])
        ray.get([actor.__ray_call__.remote(keep_to, [engine_core]) for actor in engines.actors])
        return self

    def __exit__(self, *details: Any) -> None:
        self._exit.__exit__(*details)

    def rollouts_alone(self, staleness: int, steps: int, filtered: float = 0.0) -> dict[str, float]:
        """Sampled tokens per second of taking while nothing is trained; syncs in between are not counted.

        With staleness the engines stay at one version, and the bound is set so high that no group gets too old.
        """
        version, seconds, before = self._publisher.version, 0.0, 0
        bound = steps + 3 if staleness else 0
        with self._rollouts(bound, steps + 1, filtered, depth=staleness + 1) as (rollouts, ledger):
            for step in range(steps + 1):
                started = time.monotonic()
                groups = rollouts.take(version).groups
                if step == 0:
                    before = rollouts.sampled_tokens
                else:
                    seconds += time.monotonic() - started
                rollouts.trained(groups, step)
                version = version + 1 if staleness else self._publisher.publish().version
                rollouts.advance(version)
            ledger.check()
            tokens = rollouts.sampled_tokens - before
        return {"tokens_per_s": tokens / seconds, "seconds": seconds}

    def learner_alone(self, steps: int) -> float:
        """Trained tokens per second over one step's samples."""
        with self._rollouts(1, 1, 0.0, depth=2) as (rollouts, _):
            version = self._publisher.version
            batch = rollout_batch(rollouts.take(version).groups, version, 1.0, 1)
            algorithm = self._algorithm()
            for step in range(steps + 1):
                if step == 1:
                    started = time.monotonic()
                [part] = optimiser_steps(batch, 1)
                held = self._learners.hold(batch, [part])
                advantages = algorithm.advantages(batch.samples, held.kl_nats)
                held.update(0, advantages, algorithm.sample_weights(batch.samples.completion_tokens))
            return steps * float(batch.samples.completion_tokens.sum()) / (time.monotonic() - started)

    @property
    def learners(self) -> RayLearnerGroup:
        return self._learners

    def steps(
        self,
        staleness: int,
        count: int,
        learners: LearnerGroup,
        journal: Callable[[int], Path | None] = lambda step: None,
    ) -> Iterator[StepRecord]:
        """The steps of the controller's loop."""
        with self._rollouts(staleness, count, 0.0, depth=staleness + 1) as (rollouts, _):
            controller = Controller(
                rollouts=rollouts,
                learners=learners,
                publisher=self._publisher,
                algorithm=self._algorithm(),
                correct_at=1.0,
                max_staleness=staleness,
                updates_per_step=1,
                journal=journal,
            )
            yield from controller.steps(count)

    def together(self, staleness: int, steps: int) -> float:
        """Trained tokens per second of the controller's loop."""
        tokens = 0
        for number, record in enumerate(self.steps(staleness, steps + 2, self._learners)):
            if number == 1:
                started = time.monotonic()
            elif number > 1:
                tokens += sum(update.trained_tokens for update in record.updates)
        return tokens / (time.monotonic() - started)

    def _algorithm(self) -> OnlineAlgorithm:
        algorithm = build("grpo_icepop", {})
        assert isinstance(algorithm, OnlineAlgorithm)
        return algorithm

    @contextmanager
    def _rollouts(
        self, staleness: int, steps: int, filtered: float, *, depth: int
    ) -> Iterator[tuple[TrainingRollouts, Ledger]]:
        self._stages += 1
        name, case = f"stage{self._stages}", self._config.rollouts
        stage = self._config.stages["rl"]
        assert isinstance(stage, RlStage)
        per_step, verdicts = stage.prompts_per_step, random.Random(0)
        limits = Limits(name, per_step, staleness, depth, steps * per_step, 1000, 1.0)
        ledger = Ledger(self._folder / name)
        sampling = Sampling.of(self._config, samples=case.group_size)
        stream = PromptStream(self._sources.of("rl"), self._stages)

        def verdict(_: ScoredGroup) -> Rejected | None:
            return Rejected("filtered", "benchmark") if verdicts.random() < filtered else None

        select: Callable[[ScoredGroup], Rejected | None] = verdict
        rollouts = TrainingRollouts(
            self._dispatcher,
            StalenessBuffer(select, ledger, limits),
            ledger,
            lambda group_id, place: GroupRequest(group_id, stream.at(place), False, sampling),
        )
        try:
            yield rollouts, ledger
        finally:
            rollouts.close()
            ledger.shutdown()
