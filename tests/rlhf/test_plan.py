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
STAGES: dict[str, dict[str, Any]] = {
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
    assert rows["learner"] == "3 x DeepSpeed ZeRO-3, torch AdamW (fused), 1 CPU each"
    assert rows["engine"] == "2 x vLLM, 1 CPU each"
    assert rows["reward"] == "1 x graders, 1 CPU each"
    assert rows["reserved"] == "6 CPU"


def test_the_plan_spells_out_the_batch_arithmetic() -> None:
    config = run_config(training={"ranks": 2, "token_budget": 1000}, rollouts={"group_size": 4})
    assert rows_of(config, "stage rl")["a step"] == "16 prompts x 4 samples = 64 rows, 2 optimiser step(s)"
    packed = "sequences over 2 ranks, packed into micro-batches of 1000 tokens"
    assert rows_of(config, "stage rl")["an update"] == f"32 {packed}"
    assert rows_of(config, "stage sft")["an update"] == f"48 {packed}"
    assert rows_of(config, "stage sft")["algorithm"] == "sft"
    assert rows_of(config, "stage rl")["algorithm"] == "grpo_icepop"


@pytest.mark.parametrize(("context", "budget"), [(256, 4096), (4096, 4096), (32_768, 32_768)])
def test_without_a_token_budget_the_plan_has_that_of_the_context(context: int, budget: int) -> None:
    model = {"kind": "exaone4_tiny", "max_context_tokens": context}
    wanted = f"48 sequences over 2 ranks, packed into micro-batches of {budget} tokens"
    assert rows_of(run_config(model=model), "stage sft")["an update"] == wanted


def test_the_plan_tells_what_a_filter_asks_and_drops() -> None:
    stages = {"filter": {"kind": "filter", "prompts": 500}, "band": {"kind": "filter", "drop_at_most": 0}, **STAGES}
    stages["band"] |= {"samples_per_prompt": 16, "drop_at_least": 12}
    config = run_config(stages=stages)
    assert rows_of(config, "stage filter") == {"prompts": "up to 500 x 8", "dropped": "8 or more correct"}
    assert rows_of(config, "stage band") == {
        "prompts": "up to 1024 x 16",
        "dropped": "12 or more, or 0 or fewer correct",
    }


def test_the_plan_tells_what_a_collect_stage_makes() -> None:
    pairs = {"kind": "collect", "chosen": "shortest_correct", "rejected": "incorrect"}
    groups = {"kind": "collect", "produce": "groups", "prompts": 64, "reuse": "earlier", "reuse_fraction": 0.25}
    config = run_config(stages={"pairs": pairs, "groups": groups})
    assert rows_of(config, "stage pairs") == {"prompts": "up to 256 x 8", "pairs": "shortest_correct over incorrect"}
    assert rows_of(config, "stage groups") == {
        "prompts": "up to 64 x 8",
        "groups": "of 4",
        "reused": "25% from earlier",
    }


def preference(data: object, algorithm: str) -> dict[str, Any]:
    return {"kind": "preference", "data": data, "algorithm": {"name": algorithm}, "optimizer": OPTIMIZER, "epochs": 1.5}


def test_the_plan_counts_both_completions_of_a_pair() -> None:
    stages = {"collect": {"kind": "collect"}, "dpo": preference("collect", "dpo")}
    rows = rows_of(run_config(stages=stages, training={"ranks": 2, "token_budget": 300}), "stage dpo")
    assert (rows["algorithm"], rows["steps"]) == ("dpo", "1.5 epoch(s)")
    assert rows["a step"] == "32 pairs of collect"
    assert rows["an update"] == "64 sequences over 2 ranks, packed into micro-batches of 300 tokens"


def test_the_plan_counts_the_completions_of_groups_where_it_can_know_them() -> None:
    collect = {"kind": "collect", "produce": "groups", "group_size": 3}
    file = {"kind": "jsonl", "path": "groups.jsonl"}
    stages = {"collect": collect, "known": preference("collect", "grouper"), "unknown": preference(file, "grouper")}
    config = run_config(stages=stages, training={"ranks": 2, "token_budget": 300})
    wanted = "96 sequences over 2 ranks, packed into micro-batches of 300 tokens"
    assert rows_of(config, "stage known")["an update"] == wanted
    assert rows_of(config, "stage unknown")["a step"] == "32 groups of groups.jsonl"
    assert "an update" not in rows_of(config, "stage unknown")


def test_the_plan_names_the_algorithm_of_the_stage_not_of_the_run() -> None:
    stages = {"rl": {**STAGES["rl"], "algorithm": {"name": "agapo"}}, "other": STAGES["rl"]}
    config = run_config(stages=stages)
    assert rows_of(config, "stage rl")["algorithm"] == "agapo"
    assert rows_of(config, "stage other")["algorithm"] == "grpo_icepop"


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
