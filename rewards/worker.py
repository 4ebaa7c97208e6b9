"""The Ray shell round `Scorer`."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle

from rewards.scorer import Scorer
from rlhf.config import RewardsConfig
from rlhf.plugins import absolute
from rlhf.samples import SampleGroup, ScoredGroup


class RewardWorker:
    """A `Scorer` in a Ray actor."""

    def __init__(self, config: RewardsConfig) -> None:
        self._scorer = Scorer(config)

    def score(self, group: SampleGroup) -> ScoredGroup:
        return self._scorer.score(group)

    def ping(self) -> bool:
        return True

    def close(self) -> None:
        self._scorer.close()


def spawn(config: RewardsConfig, count: int, actor_options: dict[str, Any]) -> list[ActorHandle]:
    """`count` reward workers, starting up. Each scores as many groups at a time as it has grader processes.

    Paths in `config.modules` are made absolute here, because an actor may run in another folder.
    """
    config = config.model_copy(update={"modules": absolute(config.modules)})
    options = {"max_concurrency": config.processes + 1} | actor_options  # one more, for ping and close
    actor = ray.remote(RewardWorker).options(**options)
    return [actor.remote(config) for _ in range(count)]
