"""Every rule names its key; all problems of a config are told at once."""

from __future__ import annotations

import copy
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from rlhf import rules, validation
from rlhf.config import RunConfig
from rlhf.errors import ConfigError
from rlhf.validation import broken_rules, check_run_root, validate

VALID: dict[str, Any] = {
    "experiment": "test",
    "model": {"kind": "exaone4_tiny"},
    "data": {"train": {"kind": "procedural"}, "evaluation": {"kind": "procedural", "split": "held_out"}},
    "stages": {
        "sft": {"kind": "sft", "steps": 10, "optimizer": {"learning_rate": 1e-3}},
        "rl": {"kind": "rl", "steps": 5, "optimizer": {"learning_rate": 1e-4}},
    },
    "algorithm": {"name": "grpo_icepop"},
    "rewards": {"components": {"math": {}}},
}
MISSING = object()


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """VALID with dotted keys set, or taken out where the value is MISSING."""
    raw = copy.deepcopy(VALID)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
    return raw


def problems_of(changes: dict[str, Any], reward_names: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(changed(changes), reward_names)
    return caught.value.problems


def only_problem(changes: dict[str, Any], reward_names: list[str] | None = None) -> str:
    (found,) = problems_of(changes, reward_names)
    assert re.fullmatch(r"\S.* = .+: .+\. .+[.?]", found), f"not of the form `key = value: rule. reason. fix.`: {found}"
    return found


def test_the_base_of_these_tests_is_valid() -> None:
    config = validate(VALID, reward_names=["math"])
    assert config == RunConfig.model_validate(VALID)
    assert broken_rules(config) == []


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "start", "end"),
    [
        (
            {"rollouts.group_sise": 4},
            "rollouts.group_sise = 4: is not a key of rollouts",
            "Did you mean rollouts.group_size?",
        ),
        ({"rollouts.ranks": 2}, "rollouts.ranks = 2: is not a key of rollouts", "Did you mean training.ranks?"),
        ({"group_size": 4}, "group_size = 4: is not a key of the run config", "Did you mean rollouts.group_size?"),
        (
            {"stages.rl.updates": 2},
            "stages.rl.updates = 2: is not a key of stages.rl",
            "Did you mean stages.rl.updates_per_step?",
        ),
        (
            {"stages.rl.optimizer.lr": 1e-4},
            "stages.rl.optimizer.lr = 0.0001:",
            "Did you mean stages.rl.optimizer.learning_rate?",
        ),
        (
            {"training.learning_rate": 1},
            "training.learning_rate = 1:",
            "Did you mean stages.sft.optimizer.learning_rate or stages.rl.optimizer.learning_rate?",
        ),
        ({"model.hiden_size": 64}, "model.hiden_size = 64: is not a key of model", "Did you mean model.hidden_size?"),
        (
            {"rewards.components.math.wieght": 1},
            "rewards.components.math.wieght = 1:",
            "Did you mean rewards.components.math.weight?",
        ),
        ({"rollouts.zzz": 1}, "rollouts.zzz = 1:", "gpu_memory_utilization, prefix_caching, silence_deadline_s."),
        (
            {"algorithm.clip_lo": 0.1},
            "algorithm.clip_lo = 0.1: is not a key of algorithm",
            "Did you mean algorithm.clip_low?",
        ),
        ({"algorithm.group_size": 4}, "algorithm.group_size = 4:", "Did you mean rollouts.group_size?"),
        ({"rollouts.clip_low": 0.1}, "rollouts.clip_low = 0.1:", "Did you mean algorithm.clip_low?"),
    ],
)
def test_an_unknown_key_gets_the_nearest_valid_one(changes: dict[str, Any], start: str, end: str) -> None:
    found = only_problem(changes)
    assert found.startswith(start)
    assert found.endswith(end)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"stages.rl.steps": MISSING},
            "stages.rl.steps = (missing): must be an integer >= 1. It has no default. Add stages.rl.steps.",
        ),
        ({"data.evaluation": MISSING}, "data.evaluation = (missing): must be a mapping with kind: "),
        (
            {"rollouts.group_size": "eight"},
            "rollouts.group_size = 'eight': must be an integer >= 1. This is text. Give such a value, or leave "
            "the key out for the default 8.",
        ),
        (
            {"rollouts.group_size": 1.5},
            "rollouts.group_size = 1.5: must be an integer >= 1. This is a number with a fraction.",
        ),
        ({"rollouts.group_size": [1]}, "rollouts.group_size = [1]: must be an integer >= 1. This is a list."),
        (
            {"rollouts.num_engines": 0},
            "rollouts.num_engines = 0: must be an integer >= 1. The value is out of range. The nearest valid "
            "value is 1.",
        ),
        (
            {"rollouts.temperature": 0},
            "rollouts.temperature = 0: must be a number > 0 and <= 5. The value is out of range. Give such a "
            "value, or leave the key out for the default 1.0.",
        ),
        (
            {"rollouts.reasoning_fraction": 1.5},
            "rollouts.reasoning_fraction = 1.5: must be a number >= 0 and <= 1. The value is out of range. The "
            "nearest valid value is 1.0.",
        ),
        (
            {"stages.rl.optimizer.schedule": "cosin"},
            "stages.rl.optimizer.schedule = 'cosin': must be one of constant, cosine, linear. There is no "
            "'cosin'. Did you mean cosine?",
        ),
        (
            {"training.zero_stage": 4},
            "training.zero_stage = 4: must be one of 1, 2, 3. There is no 4. Choose one of them.",
        ),
        ({"rollouts.prefix_caching": "maybe"}, "rollouts.prefix_caching = 'maybe': must be true or false."),
        (
            {"model.kind": "exaone"},
            "model.kind = exaone: must be one of exaone4_tiny, hf, smollm2_135m. It decides which other keys "
            "there are. Did you mean exaone4_tiny?",
        ),
        ({"stages.rl.kind": MISSING}, "stages.rl.kind = (missing): must be one of rl, sft."),
        ({"experiment": "a b"}, "experiment = 'a b': must be text that matches ^[A-Za-z0-9]"),
        ({"stages": {}}, "stages = {}: must be a mapping that is not empty. There are too few entries."),
        ({"training": None}, "training = null: must be a mapping. This is empty."),
        ({"stages.rl.optimizer.betas": [0.9]}, "stages.rl.optimizer.betas.1 = (missing): must be a number."),
        (
            {"data.train": {"kind": "jsonl", "path": "x", "limit": -1}},
            "data.train.limit = -1: must be an integer >= 1 or null. The value is out of range. The nearest "
            "valid value is 1.",
        ),
        (
            {"cluster.address": 5},
            "cluster.address = 5: must be text or null. This is an integer. Give such a value, or null.",
        ),
        ({"algorithm.clip_high": -1}, "algorithm.clip_high = -1: must be a number > 0."),
        ({"algorithm.reduction": "mean"}, "algorithm.reduction = 'mean': must be one of sequence_sum, sequence_mean,"),
        (
            {"algorithm.name": "grpo_icepopp"},
            "algorithm.name = grpo_icepopp: must be a registered algorithm. Did you mean grpo_icepop?",
        ),
        ({"algorithm.name": MISSING}, "algorithm.name = (missing): must be text."),
    ],
)
def test_a_wrong_field_is_told_by_its_dotted_key(changes: dict[str, Any], wanted: str) -> None:
    assert only_problem(changes).startswith(wanted)


def test_discriminator_tags_are_not_part_of_a_key() -> None:
    # pydantic's own locations are ("model", "exaone4_tiny", "heads") and ("stages", "rl", "rl", "steps").
    found = problems_of({"model.heads": 0, "stages.rl.steps": 0})
    assert [text.partition(" = ")[0] for text in found] == ["model.heads", "stages.rl.steps"]


def test_a_config_that_is_no_mapping_is_told_so() -> None:
    with pytest.raises(ConfigError, match="config = 5: must be a mapping"):
        validate(5)  # type: ignore[arg-type]


# --- all at once ------------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_also_across_sections_when_a_field_is_wrong() -> None:
    found = problems_of(
        {
            "seed": -1,  # a field
            "training.rank": 2,  # an unknown key
            "algorithm.clip_low": 5,  # the algorithm's own check
            "stages.sft.stepps": 3,  # a stage that fails must not hide the rules of the others
            "stages.rl.updates_per_step": 7,  # a rule of one stage
            "rollouts.max_completion_tokens": 255,  # a rule over model and rollouts
        }
    )
    keys = [text.partition(" = ")[0] for text in found]
    assert sorted(keys) == [
        "algorithm.clip_low",
        "rollouts.max_completion_tokens",
        "seed",
        "stages.rl.prompts_per_step",
        "stages.sft.stepps",
        "training.rank",
    ]


def test_a_section_that_fails_is_not_read_by_rules() -> None:
    found = problems_of({"rollouts.max_completion_tokens": 255, "rollouts.top_q": 1})
    assert [text.partition(" = ")[0] for text in found] == ["rollouts.top_q"]


def test_a_config_error_counts_its_problems() -> None:
    with pytest.raises(ConfigError, match=r"^2 problems in the configuration:\n  - seed = -1: .*\n  - foo = 1: "):
        validate({**VALID, "seed": -1, "foo": 1})


def test_every_rule_has_a_test_here() -> None:
    assert {rule for rule, *_ in RULES} == {function.__name__ for function in rules._rules}


# --- rules across sections --------------------------------------------------------------------------------------------

WITH_GPUS = {"cluster.device": "cuda"}
COLOCATED = {**WITH_GPUS, "cluster.placement": "colocated", "training.ranks": 2, "rollouts.num_engines": 2}
SFT_ONLY = {"stages": {"sft": VALID["stages"]["sft"]}}
RULES: list[tuple[str, dict[str, Any], str]] = [
    (
        "stage_names_are_safe",
        {"stages.a/b": VALID["stages"]["sft"]},
        "stages.a/b = {...}: a stage name must be letters",
    ),
    (
        "stage_names_are_safe",
        {"stages.before": VALID["stages"]["sft"]},
        "stages.before = {...}: a stage must not be called",
    ),
    (
        "stage_names_differ_without_case",
        {"stages.RL": VALID["stages"]["rl"]},
        "stages.RL = {...}: must differ from stages.rl",
    ),
    (
        "warm_up_fits_the_stage",
        {"stages.sft.optimizer.warmup_steps": 11},
        "stages.sft.optimizer.warmup_steps = 11: must be at most the stage's 10 optimiser steps",
    ),
    (
        "learning_rate_ends_below_its_start",
        {"stages.rl.optimizer.min_learning_rate": 0.1},
        "stages.rl.optimizer.min_learning_rate = 0.1: must be at most learning_rate = 0.0001",
    ),
    (
        "betas_are_decay_rates",
        {"stages.rl.optimizer.betas": [0.9, 1.0]},
        "stages.rl.optimizer.betas = [0.9, 1.0]: both must be >= 0 and < 1",
    ),
    (
        "prompts_divide_into_updates",
        {"stages.rl.updates_per_step": 7},
        "stages.rl.prompts_per_step = 64: must be divisible by updates_per_step = 7",
    ),
    (
        "rl_trains_on_rollouts",
        {"algorithm.name": "sft"},
        "algorithm.name = sft: must be an algorithm that trains on rollouts",
    ),
    (
        "corrected_ratios_need_the_full_vocabulary",
        {"rollouts.top_p": 0.9},
        "rollouts.top_p = 0.9: must be 1.0 with grpo_icepop",
    ),
    (
        "corrected_ratios_need_the_full_vocabulary",
        {"rollouts.top_k": 20},
        "rollouts.top_k = 20: must be 0 with grpo_icepop",
    ),
    (
        "group_baselines_need_two_samples",
        {"rollouts.group_size": 1},
        "rollouts.group_size = 1: must be >= 2 with grpo_icepop",
    ),
    (
        "context_has_room_for_the_prompt",
        {"rollouts.max_completion_tokens": 250},
        "rollouts.max_completion_tokens = 250: must leave at least 8 of model.max_context_tokens = 256 to the "
        "prompt. 6 tokens remain. Set it to at most 248; or raise model.max_context_tokens to at least 258.",
    ),
    (
        "context_has_room_for_the_prompt",
        {"rollouts.max_completion_tokens": 300},
        "rollouts.max_completion_tokens = 300: must leave at least 8 of model.max_context_tokens = 256 to the "
        "prompt. The completion alone takes 44 more than there are.",
    ),
    (
        "heads_divide_the_model",
        {"model.kv_heads": 3},
        "model.kv_heads = 3: must divide model.heads = 4. Equally many query heads share each key-value head. "
        "Nearest valid: 2 or 4.",
    ),
    (
        "heads_divide_the_model",
        {"model.hidden_size": 130},
        "model.hidden_size = 130: must be divisible by model.heads = 4. The heads share it equally. Nearest "
        "valid: 128 or 136.",
    ),
    (
        "heads_divide_the_model",
        {"model.hidden_size": 132},
        "model.hidden_size = 132: model.hidden_size / model.heads must be even, and is 33. Rotary positions turn "
        "pairs of dimensions. Nearest valid: 128 or 136.",
    ),
    (
        "tensor_parallel_divides_the_heads",
        {"rollouts.tensor_parallel_size": 3},
        "rollouts.tensor_parallel_size = 3: must divide model.heads = 4",
    ),
    (
        "every_sft_rank_has_a_row",
        {"training.ranks": 4, "stages.sft.batch_size": 3},
        "training.ranks = 4: must be at most the rows of one optimiser step, stages.sft.batch_size = 3",
    ),
    (
        "every_rl_rank_has_a_row",
        {"training.ranks": 5, "stages.rl.prompts_per_step": 2, "rollouts.group_size": 2},
        "training.ranks = 5: must be at most the rows of one optimiser step, stages.rl.prompts_per_step 2 x "
        "rollouts.group_size 2 / updates_per_step 1 = 4. A rank without a row only waits for the others. Set it "
        "to 4 or less",
    ),
    (
        "offload_needs_its_zero_stage",
        {"training.offload_optimizer": True, "training.zero_stage": 1},
        "training.offload_optimizer = true: needs training.zero_stage >= 2, and it is 1",
    ),
    (
        "offload_needs_its_zero_stage",
        {"training.offload_parameters": True},
        "training.offload_parameters = true: needs training.zero_stage >= 3, and it is 2",
    ),
    (
        "rl_has_a_routed_reward",
        {"rewards.components.math.applies": "always"},
        "rewards.components = {math}: an rl stage needs at least one component with applies: routed",
    ),
    (
        "reward_weights_train_something",
        {"rewards.components.math.weight": 0},
        "rewards.components = {math}: at least one weight must differ from 0 (math.weight = 0)",
    ),
    (
        "reward_weights_train_something",
        {"rewards.components.math.weight": float("nan")},
        "rewards.components.math.weight = nan: must be a finite number",
    ),
    (
        "correctness_threshold_is_finite",
        {"rewards.correct_at": float("inf")},
        "rewards.correct_at = inf: must be a finite number",
    ),
    (
        "reward_components_exist",
        {"rewards.components.mathh": {}},
        "rewards.components.mathh = {...}: must be a registered reward. No module registered a reward of this "
        "name. Did you mean math?",
    ),
    (
        "pass_at_k_has_k_samples",
        {"evaluation.pass_at": [1, 16]},
        "evaluation.pass_at = [1, 16]: every k must be at most evaluation.samples_per_prompt = 8",
    ),
    (
        "transport_has_a_known_name",
        {"weight_sync.transport": "ncl"},
        "weight_sync.transport = ncl: must be one of auto, ray, nccl, cuda_ipc, or package.module:Class. No "
        "transport has this name. Did you mean nccl?",
    ),
    (
        "gpu_transports_need_gpus",
        {"weight_sync.transport": "nccl"},
        "weight_sync.transport = nccl: needs cluster.device = cuda, and it is cpu. Without CUDA the NCCL "
        "communicator does nothing and reports success",
    ),
    (
        "gpu_transports_need_gpus",
        {"weight_sync.transport": "cuda_ipc"},
        "weight_sync.transport = cuda_ipc: needs cluster.device = cuda, and it is cpu",
    ),
    (
        "gpu_transports_fit_the_placement",
        {**WITH_GPUS, "weight_sync.transport": "cuda_ipc"},
        "weight_sync.transport = cuda_ipc: needs cluster.placement = colocated, and it is split",
    ),
    (
        "gpu_transports_fit_the_placement",
        {**COLOCATED, "weight_sync.transport": "nccl"},
        "weight_sync.transport = nccl: needs cluster.placement = split, and it is colocated",
    ),
    (
        "only_gpus_are_shared",
        {**COLOCATED, "cluster.device": "cpu"},
        "cluster.placement = colocated: needs cluster.device = cuda, and it is cpu",
    ),
    (
        "colocated_engines_pair_with_learners",
        {**COLOCATED, "rollouts.num_engines": 1},
        "rollouts.num_engines = 1: must equal training.ranks = 2 with cluster.placement = colocated",
    ),
    (
        "colocated_engines_pair_with_learners",
        {**COLOCATED, "rollouts.max_staleness": 1},
        "rollouts.max_staleness = 1: must be 0 with cluster.placement = colocated",
    ),
    (
        "colocated_engines_pair_with_learners",
        {**COLOCATED, "rollouts.tensor_parallel_size": 2},
        "rollouts.tensor_parallel_size = 2: must be 1 with cluster.placement = colocated",
    ),
    (
        "probes_fit_the_context",
        {"weight_sync.attestation.probe_tokens": 256},
        "weight_sync.attestation.probe_tokens = 256: must be less than model.max_context_tokens = 256",
    ),
    (
        "online_tracking_needs_a_key",
        {"tracking.wandb.mode": "online"},
        "tracking.wandb.mode = online: needs an API key in WANDB_API_KEY",
    ),
]


@pytest.fixture(autouse=True)
def _no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize(
    ("rule", "changes", "wanted"), RULES, ids=[f"{rule}-{n}" for n, (rule, *_) in enumerate(RULES)]
)
def test_a_broken_rule_is_told_by_its_key_value_reason_and_fix(rule: str, changes: dict[str, Any], wanted: str) -> None:
    assert only_problem(changes, reward_names=["math"]).startswith(wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {**SFT_ONLY, "algorithm.name": "sft", "rollouts.top_p": 0.9, "rollouts.group_size": 1},
        {"stages.rl.updates_per_step": 2, "stages.rl.optimizer.warmup_steps": 10},
        {"rollouts.max_completion_tokens": 248},
        {"model.hidden_size": 96, "model.heads": 6, "model.kv_heads": 3, "rollouts.tensor_parallel_size": 6},
        {"training.ranks": 4, "stages.sft.batch_size": 4},
        {"training.offload_parameters": True, "training.offload_optimizer": True, "training.zero_stage": 3},
        {"rewards.components.length": {"applies": "always", "weight": -0.1}},
        {"weight_sync.transport": "my_package.sync:Transport"},
        {**WITH_GPUS, "weight_sync.transport": "nccl"},
        COLOCATED,
        {**COLOCATED, "weight_sync.transport": "cuda_ipc"},
        {**WITH_GPUS, "weight_sync.transport": "ray"},
        {"evaluation.pass_at": [8]},
    ],
)
def test_what_a_rule_allows_passes(changes: dict[str, Any]) -> None:
    validate(changed(changes))


def test_the_nearest_valid_values_of_a_division_are_listed() -> None:
    found = only_problem({"stages.rl.updates_per_step": 7})
    assert found.endswith("Nearest valid: 63 or 70; or updates_per_step of 2, 4, 8.")


def test_reward_names_are_unchecked_without_a_registry() -> None:
    validate(changed({"rewards.components.anything": {}}))


def test_online_tracking_takes_a_key_from_the_environment_or_from_wandb_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = RunConfig.model_validate(changed({"tracking.wandb.mode": "online"}))
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password made-up\n")
    assert broken_rules(config) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert len(broken_rules(config)) == 1
    monkeypatch.setenv("WANDB_API_KEY", "made-up")
    assert broken_rules(config) == []


# --- the run root -----------------------------------------------------------------------------------------------------


def run_root(path: Path, min_free_disk_mib: int = 1) -> RunConfig:
    return RunConfig.model_validate({**VALID, "run_root": str(path), "min_free_disk_mib": min_free_disk_mib})


def test_a_run_root_with_space_tells_its_free_bytes_and_is_not_created(tmp_path: Path) -> None:
    assert check_run_root(run_root(tmp_path / "new" / "runs")) > 2**20
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_says_how_many_bytes_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 5, 3 * 2**20)
    monkeypatch.setattr(validation.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ConfigError, match=r"run_root = .*: must have min_free_disk_mib = 512 MiB free\. .*3145728 bytes"
    ):
        check_run_root(run_root(tmp_path, 512))


def test_a_run_root_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run_root = /proc/runs: must be writable\. /proc refuses a new file"):
        check_run_root(run_root(Path("/proc/runs")))


def test_a_run_root_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="must be writable"):
        check_run_root(run_root(tmp_path / "file" / "runs"))
