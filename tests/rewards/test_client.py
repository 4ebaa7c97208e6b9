"""The metrics of several reward workers as one; a worker that does not answer is counted, not waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from rewards.client import RewardClient, merged

ray = pytest.importorskip("ray")


@dataclass(frozen=True)
class Health:
    processes: int
    busy: int
    failed: int


def test_counts_are_summed_and_the_worst_latency_is_kept() -> None:
    first = {"reward_service/math/calls": 3, "reward_service/math/latency_p99_s": 0.5, "reward_service/queue": 1}
    second = {"reward_service/math/calls": 4, "reward_service/math/latency_p99_s": 0.2, "reward_service/queue": 2}
    other = {"reward_service/code/errors/timeout": 1}
    assert merged([first, second, other], [Health(2, 1, 0), Health(2, 0, 1)], silent=1) == {
        "reward_service/math/calls": 7,
        "reward_service/math/latency_p99_s": 0.5,
        "reward_service/queue": 3,
        "reward_service/code/errors/timeout": 1,
        "reward_service/processes": 4,
        "reward_service/processes_busy": 1,
        "reward_service/processes_failed": 1,
        "reward_service/silent_workers": 1,
    }


class Grader:
    def __init__(self, slow: bool) -> None:
        self._slow = slow

    def metrics(self) -> dict[str, float]:
        if self._slow:
            time.sleep(60)
        return {"reward_service/math/calls": 2.0}

    def health(self) -> Health:
        return Health(1, 0, 0)


@pytest.mark.integration
@pytest.mark.slow
def test_a_worker_that_is_silent_is_left_out_and_counted(tmp_path: Path) -> None:
    ray.init(num_cpus=1, include_dashboard=False)
    try:
        actor = ray.remote(Grader).options(num_cpus=0, max_concurrency=2)
        graders = [actor.remote(False), actor.remote(True)]
        ray.get([grader.health.remote() for grader in graders], timeout=60)
        metrics = RewardClient(graders, tmp_path).metrics(deadline_s=2.0)
    finally:
        ray.shutdown()
    assert metrics["reward_service/math/calls"] == 2
    assert metrics["reward_service/processes"] == 2
    assert metrics["reward_service/silent_workers"] == 1
