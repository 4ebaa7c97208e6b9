"""Real Ray over two nodes with eight pretended GPUs each: who gets which GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes

from rlhf.cluster import Cluster, roles
from rlhf.config import RunConfig

pytestmark = pytest.mark.integration

Gpu = tuple[str, int]
SOURCE = {"kind": "procedural"}
RUN: dict[str, Any] = {
    "experiment": "placement",
    "model": {"kind": "exaone4_tiny", "max_context_tokens": 128},
    "data": {"train": SOURCE, "evaluation": SOURCE},
    "stages": {"rl": {"kind": "rl", "steps": 1, "optimizer": {"learning_rate": 1e-4}}},
    "algorithm": {"name": "grpo_icepop"},
    "rewards": {"components": {"math": {}}},
}


class Place:
    def gpus(self) -> list[Gpu]:
        return [(ray.get_runtime_context().get_node_id(), int(number)) for number in ray.get_gpu_ids()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    nodes = RayNodes()
    for _ in range(2):
        nodes.add_node(num_cpus=32, num_gpus=8, include_dashboard=False, object_store_memory=100 << 20)
    yield nodes.address
    nodes.shutdown()


@pytest.mark.parametrize(
    ("placement", "tensor_parallel", "engines", "ranks"),
    [("split", 1, 2, 2), ("split", 2, 5, 3), ("split", 8, 1, 6), ("colocated", 1, 4, 4)],
)
def test_each_role_gets_the_gpus_it_needs_on_one_node_and_shares_them_only_where_colocated(
    address: str, tmp_path: Path, placement: str, tensor_parallel: int, engines: int, ranks: int
) -> None:
    cluster = {"device": "cuda", "placement": placement, "address": address, "oversubscribe_cpus": False}
    rollouts = {"tensor_parallel_size": tensor_parallel, "num_engines": engines}
    sections = {"rollouts": rollouts, "training": {"ranks": ranks}, "cluster": cluster}
    config = RunConfig.model_validate(RUN | sections)
    with Cluster(config, tmp_path) as reserved:
        started = {
            role.name: ray.remote(Place).options(**reserved.options(role, {})).remote() for role in roles(config)
        }
        held: dict[str, list[Gpu]] = {name: ray.get(actor.gpus.remote()) for name, actor in started.items()}
    for name, gpus in held.items():
        wanted = tensor_parallel if name.startswith("engine") else int(name.startswith("learner"))
        assert len(set(gpus)) == wanted, name
        assert len({node for node, _ in gpus}) <= 1, f"{name} must not reach over nodes"
    users = Counter(gpu for gpus in held.values() for gpu in gpus)
    if placement == "colocated":
        assert all(held[f"engine-{number}"] == held[f"learner-{number}"] for number in range(ranks))
        assert set(users.values()) == {2}
    else:
        assert set(users.values()) == {1}
