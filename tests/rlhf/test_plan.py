"""What a run will start and reserve, before it does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.cluster import bundles, roles
from rlhf.config import RunConfig
from rlhf.plan import plan

OPTIMIZER = {"learning_rate": 1e-4, "warmup_steps": 2}
STAGES = {
    "sft": {"kind": "sft", "steps": 10, "batch_size": 48, "optimizer": OPTIMIZER},
    "rl": {"kind": "rl", "steps": 5, "prompts_per_step": 16, "updates_per_step": 2, "optimizer": OPTIMIZER},
}


def run_config(**sections: Any) -> RunConfig:
    source = {"kind": "procedural"}
    return RunConfig.model_validate(
        {
            "experiment": "test",
            "model": {"kind": "exaone4_tiny"},
            "data": {"train": source, "evaluation": source},
            "stages": STAGES,
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            **sections,
        }
    )


def rows_of(config: RunConfig, section: str) -> dict[str, object]:
    return dict(dict(plan(config))[section])


def test_the_plan_counts_processes_and_what_they_reserve() -> None:
    rows = rows_of(run_config(training={"ranks": 3, "zero_stage": 3}, rollouts={"num_engines": 2}), "processes")
    assert rows["learner"] == "3 x DeepSpeed ZeRO-3, 1 CPU each"
    assert rows["engine"] == "2 x vLLM, 1 CPU each"
    assert rows["reward"] == "1 x graders, 1 CPU each"
    assert rows["reserved"] == "6 CPU"


def test_the_plan_spells_out_the_batch_arithmetic() -> None:
    config = run_config(training={"ranks": 2, "micro_batch_size": 10}, rollouts={"group_size": 4})
    assert rows_of(config, "stage rl")["a step"] == "16 prompts x 4 samples = 64 rows, 2 optimiser step(s)"
    assert rows_of(config, "stage rl")["an update"] == "32 rows = 2 ranks x 2 micro-batches x up to 10"
    assert rows_of(config, "stage sft")["an update"] == "48 rows = 2 ranks x 3 micro-batches x up to 10"
    assert rows_of(config, "stage sft")["algorithm"] == "sft"
    assert rows_of(config, "stage rl")["algorithm"] == "grpo_icepop"


@pytest.mark.parametrize(
    ("device", "placement", "transport"),
    [("cpu", "split", "ray"), ("cuda", "split", "nccl"), ("cuda", "colocated", "cuda_ipc")],
)
def test_the_transport_follows_device_and_placement(device: str, placement: str, transport: str) -> None:
    config = run_config(cluster={"device": device, "placement": placement})
    assert rows_of(config, "weight sync")["transport"] == transport


def test_split_gpus_belong_to_one_process_each() -> None:
    config = run_config(
        cluster={"device": "cuda"}, training={"ranks": 2}, rollouts={"num_engines": 2, "tensor_parallel_size": 2}
    )
    gpus = {role.name: role.gpus for role in roles(config)}
    assert gpus == {"learner-0": 1, "learner-1": 1, "engine-0": 2, "engine-1": 2, "reward-0": 0}
    assert len({role.bundle for role in roles(config)}) == 5


def test_colocated_learner_and_engine_share_the_gpu_of_one_bundle() -> None:
    config = run_config(
        cluster={"device": "cuda", "placement": "colocated"}, training={"ranks": 2}, rollouts={"num_engines": 2}
    )
    places = {role.name: (role.bundle, role.gpus) for role in roles(config)}
    assert places["learner-1"] == places["engine-1"] == (1, 0.5)
    assert bundles(config) == [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0}]


@given(
    ranks=st.integers(1, 5),
    engines=st.integers(1, 5),
    graders=st.integers(1, 3),
    device=st.sampled_from(["cpu", "cuda"]),
    placement=st.sampled_from(["split", "colocated"]),
)
def test_bundles_reserve_what_all_roles_together_need(
    ranks: int, engines: int, graders: int, device: str, placement: str
) -> None:
    config = run_config(
        cluster={"device": device, "placement": placement},
        training={"ranks": ranks},
        rollouts={"num_engines": engines},
        rewards={"components": {"math": {}}, "workers": graders},
    )
    found, wanted = roles(config), bundles(config)
    assert len({role.name for role in found}) == len(found) == ranks + engines + graders
    assert {role.bundle for role in found} == set(range(len(wanted)))
    assert sum(bundle.get("CPU", 0.0) for bundle in wanted) == sum(role.cpus for role in found)
    assert sum(bundle.get("GPU", 0.0) for bundle in wanted) == sum(role.gpus for role in found)
