"""The Ray shell round `Scorer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from rewards.processes import Health
from rewards.scorer import Scorer
from rlhf.config import RewardsConfig
from rlhf.plugins import absolute
from rlhf.samples import Scores, TextGroup

MAX_RESTARTS = 3  # of one worker: what kills it more often is no accident


class RewardWorker:
    """A `Scorer` in a Ray actor."""

    def __init__(self, config: RewardsConfig, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)  # before the grader processes, which inherit it
        self._scorer = Scorer(config)

    def score(self, group: TextGroup) -> Scores:
        return self._scorer.score(group)

    def metrics(self) -> Mapping[str, float]:
        return self._scorer.metrics()

    def health(self) -> Health:
        return self._scorer.health()

    def ping(self) -> bool:
        return True

    def close(self) -> None:
        self._scorer.close()


def spawn(
    config: RewardsConfig, count: int, actor_options: dict[str, Any], environment: Mapping[str, str] | None = None
) -> list[ActorHandle]:
    """`count` reward workers, starting up. Each scores as many groups at a time as its grader processes have use for.

    Paths in the config are made absolute here, because an actor may run in another folder. `environment` may hold
    secrets: unlike that of the options it is in no log of Ray's. A worker that dies is started again, and what it was
    scoring is scored again: a group that waits for its reward is kept by Ray, not by the worker.
    """
    at_work = config.process_count + config.async_calls
    options = {
        "max_concurrency": at_work + 2,  # two more, for ping, metrics, health and close
        "max_restarts": MAX_RESTARTS,
        "max_task_retries": MAX_RESTARTS,
    } | actor_options
    actor = ray.remote(RewardWorker).options(**options)
    return [actor.remote(with_absolute_paths(config), dict(environment or {})) for _ in range(count)]


def with_absolute_paths(config: RewardsConfig) -> RewardsConfig:
    components = {}
    for name, part in config.components.items():
        module, colon, function = (part.path or "").rpartition(":")
        path = f"{absolute([module])[0]}{colon}{function}" if part.path else part.path
        components[name] = part.model_copy(update={"path": path})
    return config.model_copy(update={"components": components, "modules": absolute(config.modules)})
