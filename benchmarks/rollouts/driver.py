"""The driver's work: bytes that pass through it by completion length, its processor time per group by engines.

Engines and graders are real Ray actors that only wait and return what an engine returns. Dispatcher, buffer, ledger and
controller are those of a run; learners and publisher do nothing. Bytes are counted on the loopback interface, over
which all of Ray's messages on one machine pass; arrays that stay in the object store do not.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.isolated import isolated
from benchmarks.rollouts.waiting import WaitingEngine, WaitingGrader
from rewards.client import RewardClient
from rlhf.algorithms.grpo import Grpo
from rlhf.cluster import OBJECT_STORE_ENVIRONMENT
from rlhf.controller import Controller
from rlhf.ledger import Ledger
from rlhf.metrics import MetricSums
from rlhf.protocols import SyncReport, UpdateReport
from rlhf.samples import Prompt
from rollouts.buffer import Limits, StalenessBuffer
from rollouts.dispatcher import Dispatcher, TrainingRollouts
from rollouts.engine import Sampling
from rollouts.generator import GroupRequest
from rollouts.worker import RayEngine

LENGTHS = (16, 256, 1024, 4096)
ENGINES = (1, 10, 100, 1000)
MOST_ACTORS = 100
SHARED_ACTORS = 20  # behind the handles, where there are more engines than actors
GROUP_SIZE = 8
PROMPTS_PER_STEP = 64
START_DEADLINE_S = 900.0


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """Bytes per sample and trained token at several lengths; milliseconds per group with several engines."""
    lengths, engines = (LENGTHS[:3], ENGINES[:2]) if quick else (LENGTHS, ENGINES)
    by_length = [{"completion_tokens": n, **isolated(measure, 2, n, 6)} for n in lengths]
    by_engines = [{"engines": n, **isolated(measure, n, 64, 6 if quick else 20)} for n in engines]
    at_1024 = next(row for row in by_length if row["completion_tokens"] == 1024)
    times = [row["ms_per_group"] for row in by_engines]
    shortest = by_length[0]["bytes_per_sample"]
    return {
        "by_length": by_length,
        "by_engines": by_engines,
        "figures": {
            "driver_bytes_per_token_1024": at_1024["bytes_per_sample"] / 1024,
            "driver_bytes_growth": max(row["bytes_per_sample"] for row in by_length) / shortest,
            f"driver_ms_per_group_{engines[-1]}_over_1": times[-1] / times[0],
            "driver_ms_per_group": times[0],
        },
    }


class Nothing:
    """Learners and publisher that do nothing but count versions."""

    version = 0
    kl_nats = torch.zeros(PROMPTS_PER_STEP * GROUP_SIZE)

    def hold(self, *_: Any) -> Nothing:
        return self

    def update(self, *_: Any) -> UpdateReport:
        return UpdateReport(0.0, 0.0, 0.0, 1, MetricSums())

    def master_digests(self) -> list[dict[str, str]]:
        return []

    def publish(self) -> SyncReport:
        self.version += 1
        return SyncReport(self.version, 0, 0.0, 0.0, 0.0, 0.0)


def measure(engines: int, length: int, steps: int) -> dict[str, float]:
    """One stage; runs in its own process. The first two steps warm up."""
    os.environ |= OBJECT_STORE_ENVIRONMENT
    cores = float(os.cpu_count() or 1)
    ray.init(num_cpus=int(cores), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return _measured(engines, length, steps)
    finally:
        ray.shutdown()


def _measured(engines: int, length: int, steps: int) -> dict[str, float]:
    environment = {"env_vars": OBJECT_STORE_ENVIRONMENT}
    options = {"num_cpus": 0, "max_concurrency": 4096, "runtime_env": environment}
    actors = engines if engines <= MOST_ACTORS else SHARED_ACTORS
    handles = [ray.remote(WaitingEngine).options(**options).remote(length) for _ in range(actors)]
    grader = ray.remote(WaitingGrader).options(num_cpus=0, runtime_env=environment).remote()
    # A hundred processes take minutes to start on two cores, and that is not the driver's work.
    ray.get([handle.abort.remote("") for handle in handles], timeout=START_DEADLINE_S)
    places = itertools.islice(itertools.cycle(handles), engines)
    nothing = Nothing()
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        scoring = RewardClient([grader], Path(folder))
        dispatcher = Dispatcher([RayEngine(handle) for handle in places], scoring.score, 120.0)
        # The engines stay at version 0, so the bound is that of the whole stage; two steps are kept alive.
        limits = Limits("rl", PROMPTS_PER_STEP, steps, 2, steps * PROMPTS_PER_STEP, 8, 0.05)
        prompt = Prompt("p", ({"role": "user", "content": "1+1=?"},), "2", "math")
        sampling = Sampling(GROUP_SIZE, length, 1.0)
        rollouts = TrainingRollouts(
            dispatcher,
            StalenessBuffer(lambda _: None, ledger, limits),
            ledger,
            lambda group_id, _: GroupRequest(group_id, prompt, False, sampling),
        )
        controller = Controller(
            rollouts=rollouts,
            learners=nothing,  # type: ignore[arg-type]
            publisher=nothing,
            algorithm=Grpo(),
            correct_at=1.0,
            max_staleness=steps,
            updates_per_step=1,
            journal=lambda _: None,
        )
        seconds, sent = [], []
        for _ in controller.steps(steps):
            seconds.append(time.process_time())
            sent.append(loopback_bytes())
        rollouts.close()
        dispatcher.close()
        ledger.shutdown()
    spent = [after - before for before, after in itertools.pairwise(seconds[1:])]
    moved = [after - before for before, after in itertools.pairwise(sent[1:])]
    return {
        "ms_per_group": 1000 * statistics.median(spent) / PROMPTS_PER_STEP,
        "bytes_per_sample": statistics.median(moved) / (PROMPTS_PER_STEP * GROUP_SIZE),
        "actors": actors,
    }


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())
