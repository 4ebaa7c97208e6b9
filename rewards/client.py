"""All reward workers as one: a group's text goes in where it lies, its outcomes come out."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from rlhf.cluster import RayStored, awaited, result
from rlhf.reward_failures import RewardFailures
from rlhf.samples import SampleGroup, ScoredGroup


class RewardClient:
    """Sends each group to the worker with the least to do, and writes down the rewards that failed."""

    def __init__(self, graders: Sequence[ActorHandle], run_dir: Path) -> None:
        self._graders = graders
        self._load = [0] * len(graders)
        self._failures = RewardFailures(run_dir)

    async def score(self, group: SampleGroup) -> ScoredGroup:
        """Raises what the worker raised, or WorkerLostError."""
        text = group.stored.text_reference if isinstance(group.stored, RayStored) else group.stored.text()
        number = self._load.index(min(self._load))
        self._load[number] += 1
        try:
            scores = await awaited(self._graders[number].score.remote(text), f"the reward of group {group.group_id}")
        finally:
            self._load[number] -= 1
        return self._failures.recorded(ScoredGroup(group, scores.outcomes, scores.seconds))

    def metrics(self, deadline_s: float = 5.0) -> dict[str, float]:
        """`reward_service/...` of all workers as `merged` says, with those that answer within `deadline_s`."""
        asked = [call.remote() for grader in self._graders for call in (grader.metrics, grader.health)]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=deadline_s) if asked else ([], [])
        done = set(answered)
        metrics, health = (
            [result(reference, "metrics of a reward worker") for reference in part if reference in done]
            for part in (asked[::2], asked[1::2])
        )
        return merged(metrics, health, silent=len(self._graders) - min(len(metrics), len(health)))


def merged(metrics: Sequence[Mapping[str, float]], health: Sequence[Any], silent: int) -> dict[str, float]:
    """Counts and queues of all workers summed; of latencies the worst worker's, as no percentile can be merged.

    `processes`, `processes_busy` and `processes_failed` are of the workers that answered, all but `silent_workers`.
    """
    merged: dict[str, float] = {}
    for key, value in (item for of in metrics for item in of.items()):
        joined = max if "/latency_" in key else operator.add
        merged[key] = joined(merged[key], value) if key in merged else value
    merged["reward_service/processes"] = sum(one.processes for one in health)
    merged["reward_service/processes_busy"] = sum(one.busy for one in health)
    merged["reward_service/processes_failed"] = sum(one.failed for one in health)
    return merged | {"reward_service/silent_workers": silent}
