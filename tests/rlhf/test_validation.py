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
REWARD_NAMES = ["math", "judge", "judge_pairwise", "preference"]
MISSING = object()
COLLECT = {"kind": "collect"}


def preference(data: object, algorithm: str | None = None) -> dict[str, Any]:
    chosen = {} if algorithm is None else {"algorithm": {"name": algorithm}}
    return {"kind": "preference", "data": data, "optimizer": {"learning_rate": 1e-5}, **chosen}


FROM_A_FILE = preference({"kind": "jsonl", "path": "x"}, "dpo")


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
            place[last] = copy.deepcopy(value)
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
        ({"rollouts.zzz": 1}, "rollouts.zzz = 1:", "kv_cache_gib, engine_args, silence_deadline_s."),
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
        ({"evaluation.before": "maybe"}, "evaluation.before = 'maybe': must be true or false."),
        (
            {"model.kind": "exaone"},
            "model.kind = exaone: must be one of exaone4_tiny, hf, smollm2_135m. It decides which other keys "
            "there are. Did you mean exaone4_tiny?",
        ),
        (
            {"stages.rl.kind": MISSING},
            "stages.rl.kind = (missing): must be one of collect, filter, preference, rl, sft.",
        ),
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
            "algorithm.name = grpo_icepopp: must be a registered algorithm. None has this name. Did you mean "
            "grpo_icepop?",
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


# --- algorithms -------------------------------------------------------------------------------------------------------


ALGORITHM_PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"name": "grpo", "clip_low": 5}, ".clip_low = 5: must be a number > 0 and < 1. The value is out of range."),
    (
        {"name": "grpo", "clip_lo": 0.1},
        ".clip_lo = 0.1: is not a key of KEY. A typo must not pass for a setting. Did you mean KEY.clip_low?",
    ),
    (
        {"name": "grpo", "group_filter": "all_corect"},
        ".group_filter = 'all_corect': must be one of none, zero_variance, all_correct, not_mixed. There is no "
        "'all_corect'. Did you mean all_correct?",
    ),
    (
        {"name": "grpoo"},
        ".name = grpoo: must be a registered algorithm. None has this name. Did you mean grpo? KEY.mod",
    ),
    ({"name": "grpo", "modules": ["no_such_module_x"]}, ".modules = 'no_such_module_x': must be importable. Module"),
    (
        {"name": "grpo", "correction": {"kind": "icepopp"}},
        ".correction.kind = icepopp: must be one of geometric_mask, icepop, none, off_policy_sequence_mask, "
        "sequence_mask, tis_sequence, tis_token. It decides which other keys there are. Did you mean icepop?",
    ),
    (
        {"name": "grpo", "correction": {"kind": "icepop", "hi": 3}},
        ".correction.hi = 3: is not a key of KEY.correction. A typo must not pass for a setting. Did you mean "
        "KEY.correction.high?",
    ),
    (
        {"name": "grpo", "correction": {"kind": "icepop", "high": 0.5}},
        ".correction.high = 0.5: must be a number >= 1. The value is out of range. The nearest valid value is 1.0.",
    ),
    (
        {"name": "grpo", "correction": "icepop"},
        ".correction = 'icepop': must be a mapping with kind: geometric_mask or ",
    ),
    ({"name": "grpo", "kl": {"estimater": "k3"}}, ".kl.estimater = 'k3': is not a key of KEY.kl."),
    ({"name": "grpo", "kl": 0.1}, ".kl = 0.1: must be a mapping. This is a number with a fraction."),
    (
        {"name": "grpo", "kl": {"coefficient": float("inf")}},
        ".kl.coefficient = inf: must be a number >= 0. It is not finite. Give such a value",
    ),
    (
        {"name": "grpo", "kl": {"estimator": "k1", "placement": "loss", "coefficient": 0.1}},
        ".kl.estimator = 'k1': must not be k1 with placement loss. Its gradient there is zero in expectation. Use ",
    ),
    (
        {"name": "grpo", "kl": {"placement": "reward"}},
        ".kl.estimator = 'k3': must be k1 with placement reward. Only the plain log-ratio,",
    ),
    (
        {"name": "gspo", "correction": {"kind": "icepop"}},
        ".correction.kind = 'icepop': must not be icepop with Gspo. It weighs tokens one by one, while this algorithm "
        "has one ratio for a whole sequence. Use tis_sequence, sequence_mask or geometric_mask.",
    ),
    (
        {"name": "gspo", "kl": {"estimator": "k1", "placement": "reward_to_go", "coefficient": 0.1}},
        ".kl.placement = 'reward_to_go': must not be reward_to_go with Gspo.",
    ),
    (
        {"name": "agapo_offpolicy", "correction": {"kind": "tis_token"}},
        ".correction = {'kind': 'tis_token'}: must be none with AgapoOffPolicy. Its loss already weighs by the ratio",
    ),
    (
        {"name": "grpo", "reduction": "fixed_length"},
        ".fixed_length = null: must be set with reduction = fixed_length, and only with it. It is the constant",
    ),
    ({"name": "grpo", "fixed_length": 5}, ".fixed_length = 5: must be set with reduction = fixed_length, and only"),
]


@pytest.mark.parametrize("key", ["algorithm", "stages.rl.algorithm"])
@pytest.mark.parametrize(("chosen", "wanted"), ALGORITHM_PROBLEMS)
def test_a_problem_of_an_algorithm_has_the_key_where_the_config_chose_it(
    key: str, chosen: dict[str, Any], wanted: str
) -> None:
    (found,) = problems_of({key: chosen})
    assert re.match(r"\S.* = .+: .+\. .+[.?]", found), found
    assert found.startswith(f"{key}{wanted}".replace("KEY", key))
    assert "Value error" not in found


@pytest.mark.parametrize(
    ("hyperparameters", "wanted"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, ".label_smoothing = 0.1: must be 0 with loss ipo. It mixes"),
        ({"reduction": "sequence_mean"}, ".reduction = 'sequence_mean': must be sequence_sum. There is no"),
        ({"beta": 0}, ".beta = 0: must be a number > 0."),
        ({"betta": 1}, ".betta = 1: is not a key of stages.preference.algorithm."),
    ],
)
def test_a_problem_of_an_offline_algorithm_has_the_key_of_its_stage(
    hyperparameters: dict[str, Any], wanted: str
) -> None:
    stage = {**FROM_A_FILE, "algorithm": {"name": "dpo", **hyperparameters}}
    assert only_problem({"stages.preference": stage}).startswith(f"stages.preference.algorithm{wanted}")


def test_an_algorithm_that_many_stages_share_is_told_once() -> None:
    found = problems_of({"algorithm.clip_low": 5, "stages.more": VALID["stages"]["rl"]})
    assert [text.partition(" = ")[0] for text in found] == ["algorithm.clip_low"]


def test_the_algorithms_of_all_stages_are_checked_at_once() -> None:
    found = problems_of(
        {
            "algorithm.name": "grpoo",
            "stages.rl.algorithm": {"name": "grpo", "clip_low": 5, "kl": {"placement": "reward"}},
            "stages.preference": {**FROM_A_FILE, "algorithm": {"name": "dpo", "beta": -1}},
        }
    )
    assert sorted(text.partition(" = ")[0] for text in found) == [
        "algorithm.name",
        "stages.preference.algorithm.beta",
        "stages.rl.algorithm.clip_low",
        "stages.rl.algorithm.kl.estimator",
    ]


# --- the data of a stage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (5, " = 5: must be text or a mapping. This is an integer. Give such a value."),
        ({"kind": "jsonll", "path": "x"}, ".kind = 'jsonll': must be one of jsonl, parquet, huggingface."),
        ({"kind": "jsonl"}, ".path = (missing): must be text. It has no default. Add stages.preference.data.path."),
        ({"kind": "jsonl", "path": "x", "limt": 1}, ".limt = 1: is not a key of stages.preference.data. A typo"),
        ({"kind": "jsonl", "path": "x", "limit": 0}, ".limit = 0: must be an integer >= 1 or null."),
    ],
)
def test_wrong_preference_data_is_told_once_and_without_the_names_of_types(data: object, wanted: str) -> None:
    assert only_problem({"stages.preference": preference(data, "dpo")}).startswith(f"stages.preference.data{wanted}")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"kind": "jsonl", "path": 5}, ".path = 5: must be text."),
        (
            {"kind": "jsonl", "path": "x", "columns": {"anwser": "a"}},
            ".columns.anwser = 'a': is not a key of stages.rl.",
        ),
        (
            {"kind": "json", "path": "x"},
            ".kind = json: must be one of huggingface, jsonl, parquet, procedural, reasoning_gym.",
        ),
        ({"path": "x"}, ".kind = (missing): must be one of huggingface, jsonl, parquet, procedural, reasoning_gym."),
    ],
)
def test_wrong_data_of_a_stage_is_told_by_its_key(data: object, wanted: str) -> None:
    assert only_problem({"stages.rl.data": data}).startswith(f"stages.rl.data{wanted}")


def test_steps_of_a_preference_stage_are_epochs() -> None:
    found = only_problem({"stages.preference": {**FROM_A_FILE, "steps": 5}})
    assert found.endswith("Did you mean stages.preference.epochs?")


def test_a_config_that_was_written_down_is_valid_again() -> None:
    stages = {"stages.sft.reasoning_token_ratio": 1.5, "stages.collect": COLLECT, "stages.preference": FROM_A_FILE}
    config = validate(changed(stages))
    assert validate(config.model_dump(mode="json")) == config


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
CHAT = {"kind": "chat", "model": "org/judge"}
OWN_JUDGE = {"servers.judge": CHAT, "rewards.components.judge.params": {"endpoint": {"server": "judge"}}}
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
        "every_stage_has_an_algorithm_for_its_data",
        {"algorithm.name": "sft"},
        "algorithm.name = sft: must be an algorithm that trains on rollouts, because stage rl is of kind rl. This one "
        "trains on demonstrations.",
    ),
    (
        "every_stage_has_an_algorithm_for_its_data",
        {"stages.rl.algorithm": {"name": "dpo"}},
        "stages.rl.algorithm.name = dpo: must be an algorithm that trains on rollouts",
    ),
    (
        "every_stage_has_an_algorithm_for_its_data",
        {"stages.preference": preference({"kind": "jsonl", "path": "x"})},
        "algorithm.name = grpo_icepop: must be an algorithm over stored completions, because stage preference is of "
        "kind preference. This one trains on rollouts. Choose dpo, simper or grouper",
    ),
    (
        "preference_stages_follow_what_they_train_on",
        {"stages.preference": preference("colect", "dpo"), "stages.collect": COLLECT},
        "stages.preference.data = colect: must be the name of an earlier stage of kind collect, or a file as {kind, "
        "path}. Its pairs or groups must exist when this stage begins. Earlier ones: none.",
    ),
    (
        "preference_stages_follow_what_they_train_on",
        {"stages.collect": COLLECT, "stages.preference": preference("colect", "dpo")},
        "stages.preference.data = colect: must be the name of an earlier stage of kind collect, or a file as {kind, "
        "path}. Its pairs or groups must exist when this stage begins. Did you mean collect?",
    ),
    (
        "preference_stages_follow_what_they_train_on",
        {"stages.preference": preference("rl", "dpo")},
        "stages.preference.data = rl: must be the name of an earlier stage of kind collect",
    ),
    (
        "preference_stages_follow_what_they_train_on",
        {"stages.collect": COLLECT, "stages.preference": preference("collect", "grouper")},
        "stages.collect.produce = pairs: must be groups, because stage preference trains grouper on them.",
    ),
    (
        "preference_stages_follow_what_they_train_on",
        {"stages.collect": {**COLLECT, "produce": "groups"}, "stages.preference": preference("collect", "simper")},
        "stages.collect.produce = groups: must be pairs, because stage preference trains simper on them.",
    ),
    (
        "collected_data_is_reused_from_its_like",
        {"stages.collect": {**COLLECT, "reuse_fraction": 0.5}},
        "stages.collect.reuse_fraction = 0.5: needs reuse. Nothing says which stage's records to mix in.",
    ),
    (
        "collected_data_is_reused_from_its_like",
        {"stages.collect": COLLECT, "stages.more": {**COLLECT, "reuse": "collect"}},
        "stages.more.reuse = collect: needs reuse_fraction above 0. None of its records would be mixed in.",
    ),
    (
        "collected_data_is_reused_from_its_like",
        {"stages.collect": {**COLLECT, "reuse": "collect", "reuse_fraction": 0.5}},
        "stages.collect.reuse = collect: must be an earlier stage of kind collect. Its records must exist by then. "
        "Earlier ones: none.",
    ),
    (
        "collected_data_is_reused_from_its_like",
        {
            "stages.collect": COLLECT,
            "stages.more": {**COLLECT, "reuse": "collect", "reuse_fraction": 0.5, "produce": "groups"},
        },
        "stages.more.reuse = collect: must be a stage with produce = groups. Pairs and groups do not mix.",
    ),
    (
        "collected_data_is_reused_from_its_like",
        {"stages.collect": COLLECT, "stages.more": {**COLLECT, "reuse": "collect", "reuse_fraction": 1.0}},
        "stages.more.reuse_fraction = 1.0: must be below 1. Some records must come from this stage.",
    ),
    (
        "collected_groups_fit_their_samples",
        {"stages.collect": {**COLLECT, "produce": "groups", "samples_per_prompt": 3}},
        "stages.collect.group_size = 4: must be at most samples_per_prompt = 3.",
    ),
    (
        "collected_parts_are_rewards",
        {"stages.collect": {**COLLECT, "weights": {"mathh/format": 0.5}}},
        "stages.collect.weights.mathh/format = 0.5: must be a reward component, or component/part. No component of "
        "this name is in rewards.components. Did you mean math?",
    ),
    (
        "filters_leave_something",
        {"stages.filter": {"kind": "filter", "samples_per_prompt": 8, "drop_at_least": 9}},
        "stages.filter.drop_at_least = 9: must be at most samples_per_prompt = 8. No prompt has so many.",
    ),
    (
        "filters_leave_something",
        {"stages.filter": {"kind": "filter", "samples_per_prompt": 8, "drop_at_most": 7}},
        "stages.filter.drop_at_most = 7: must be below drop_at_least - 1 = 7. Every prompt would be dropped",
    ),
    (
        "filters_leave_something",
        {"stages.filter": {"kind": "filter", "drop_at_least": 3, "drop_at_most": 2}},
        "stages.filter.drop_at_most = 2: must be below drop_at_least - 1 = 2.",
    ),
    (
        "token_ratio_replaces_the_fraction",
        {"stages.sft.reasoning_token_ratio": 1.5, "stages.sft.reasoning_fraction": 0.5},
        "stages.sft.reasoning_fraction = 0.5: must not be set together with reasoning_token_ratio.",
    ),
    (
        "algorithms_without_a_ratio_stay_on_policy",
        {"algorithm.name": "agapo", "stages.rl.updates_per_step": 2},
        "stages.rl.updates_per_step = 2: must be 1 with agapo. agapo has no ratio to the policy that sampled, so later "
        "updates would be biased. Set it to 1.",
    ),
    (
        "algorithms_without_a_ratio_stay_on_policy",
        {"stages.rl.algorithm": {"name": "agapo"}, "rollouts.max_staleness": 1},
        "rollouts.max_staleness = 1: must be 0 with agapo and no correction. agapo has no ratio to the policy that "
        "sampled, so later updates would be biased. Set it to 0, or stages.rl.algorithm.correction.kind to "
        "tis_sequence.",
    ),
    (
        "corrected_ratios_need_the_full_vocabulary",
        {"algorithm.name": "agapo_offpolicy", "rollouts.top_p": 0.9},
        "rollouts.top_p = 0.9: must be 1.0 with agapo_offpolicy",
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
        "every_offline_rank_has_a_row",
        {"training.ranks": 4, "stages.sft.batch_size": 3},
        "training.ranks = 4: must be at most the rows of one optimiser step, stages.sft.batch_size = 3",
    ),
    (
        "every_offline_rank_has_a_row",
        {"training.ranks": 4, "stages.p": {**preference({"kind": "jsonl", "path": "x"}, "dpo"), "batch_size": 2}},
        "training.ranks = 4: must be at most the rows of one optimiser step, stages.p.batch_size = 2",
    ),
    (
        "learning_rate_ends_below_its_start",
        {
            "stages.p": preference({"kind": "jsonl", "path": "x"}, "dpo"),
            "stages.p.optimizer": {"learning_rate": 0.1, "min_learning_rate": 1.0},
        },
        "stages.p.optimizer.min_learning_rate = 1.0: must be at most learning_rate = 0.1",
    ),
    (
        "every_rl_rank_has_a_row",
        {"training.ranks": 5, "stages.rl.prompts_per_step": 2, "rollouts.group_size": 2},
        "training.ranks = 5: must be at most the rows of one optimiser step, stages.rl.prompts_per_step 2 x "
        "rollouts.group_size 2 / updates_per_step 1 = 4. A rank without a row only waits for the others. Set it "
        "to 4 or less",
    ),
    (
        "token_budget_holds_the_longest_sequence",
        {"training.token_budget": 255},
        "training.token_budget = 255: must be at least model.max_context_tokens = 256. A sequence is never split, so a "
        "longer one would exceed the memory that the budget allows. Set it to 256 or more, leave it out, or lower "
        "model.max_context_tokens.",
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
        "rewards.components = {math}: stages that score samples need at least one component with applies: routed",
    ),
    (
        "rl_has_a_routed_reward",
        {"stages": {"collect": {"kind": "collect"}}, "rewards.components.math.applies": "always"},
        "rewards.components = {math}: stages that score samples need at least one component with applies: routed",
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
        "no_component_is_called_routed",
        {"rewards.components.routed.path": "a.py:f"},
        "rewards.components.routed = {...}: a component must not be called routed. As a gate this is the one that the "
        "record names. Rename it.",
    ),
    (
        "weight_schedules_rise_in_steps",
        {"rewards.components.math.weight_schedule": [[20, 1.0], [10, 0.5]]},
        "rewards.components.math.weight_schedule = [[20, 1.0], [10, 0.5]]: steps must be >= 0 and rise. Between two "
        "points the weight is linear. Sort the points by step, each step once.",
    ),
    (
        "weight_schedules_rise_in_steps",
        {"rewards.components.math": {"weight": 0.5, "weight_schedule": [[0, 1.0]]}},
        "rewards.components.math.weight = 0.5: must not be set together with weight_schedule",
    ),
    (
        "weight_schedules_rise_in_steps",
        {"rewards.components.math.weight_schedule": [[0, float("nan")]]},
        "rewards.components.math.weight_schedule = [[0, nan]]: weights must be finite numbers",
    ),
    (
        "server_names_are_safe",
        {"servers": {"a b": CHAT}, "rewards.components.judge.params": {"endpoint": {"server": "a b"}}},
        "servers.a b = {...}: a server name must be letters, digits, _ and -",
    ),
    (
        "servers_that_are_asked_exist",
        {"rewards.components.judge.params": {"endpoint": {"server": "judge"}}},
        "rewards.components.judge.params.endpoint.server = judge: must be one of servers. No server of this name is in "
        "servers. There are none.",
    ),
    (
        "servers_that_are_asked_exist",
        {**OWN_JUDGE, "rewards.components.judge_pairwise.params": {"endpoint": {"server": "jugde"}}},
        "rewards.components.judge_pairwise.params.endpoint.server = jugde: must be one of servers. No server of this "
        "name is in servers. Did you mean judge?",
    ),
    (
        "every_server_is_asked",
        {"servers.judge": CHAT},
        "servers.judge = {...}: must be asked by a reward. It would hold its share of the machine for nothing.",
    ),
    (
        "servers_are_of_the_kind_that_is_asked",
        {**OWN_JUDGE, "servers.judge": {**CHAT, "kind": "reward_model"}},
        "servers.judge.kind = reward_model: must be chat. rewards.components.judge.params.endpoint.server names it, "
        "and judge asks /v1/chat/completions. Set it to chat, or name another server.",
    ),
    (
        "servers_are_of_the_kind_that_is_asked",
        {"servers.s": CHAT, "rewards.components.preference.params": {"endpoint": {"server": "s"}}},
        "servers.s.kind = chat: must be reward_model",
    ),
    (
        "an_endpoint_is_of_the_run_or_elsewhere",
        {**OWN_JUDGE, "rewards.components.judge.params.endpoint.base_url": "http://h/v1"},
        "rewards.components.judge.params.endpoint.base_url = http://h/v1: must be null with server: judge",
    ),
    (
        "an_endpoint_is_of_the_run_or_elsewhere",
        {**OWN_JUDGE, "rewards.components.judge.params.endpoint.api_key_env": "KEY"},
        "rewards.components.judge.params.endpoint.api_key_env = KEY: must be null",
    ),
    (
        "replies_fit_the_context_of_their_server",
        {**OWN_JUDGE, "rewards.components.judge.params.endpoint.max_tokens": 4096},
        "rewards.components.judge.params.endpoint.max_tokens = 4096: must be less than "
        "servers.judge.max_context_tokens = 4096",
    ),
    (
        "server_flags_have_one_place",
        {**OWN_JUDGE, "servers.judge.args": {"max_model_len": 5}},
        "servers.judge.args.max_model_len = 5: must not be set here. A field of the server sets it. "
        "Set servers.judge.max_context_tokens.",
    ),
    (
        "server_flags_have_one_place",
        {**OWN_JUDGE, "servers.judge.args": {"--api-key": "hunter2"}},
        "servers.judge.args.--api-key = ...: must not be set. The run decides",
    ),
    (
        "server_flags_have_one_place",
        {**OWN_JUDGE, "servers.judge.args": {"--quantization": "fp8"}},
        "servers.judge.args.--quantization = fp8: must be without leading hyphens",
    ),
    (
        "servers_on_cpu_are_one_process",
        {**OWN_JUDGE, "servers.judge.tensor_parallel_size": 2},
        "servers.judge.tensor_parallel_size = 2: must be 1 on cpu",
    ),
    (
        "gates_are_other_components",
        {"rewards.components.format": {"applies": "always", "gate": "mth", "path": "a.py:f"}},
        "rewards.components.format.gate = mth: must be a component or routed. No component of this name is in "
        "rewards.components. Did you mean math?",
    ),
    (
        "gates_are_other_components",
        {"rewards.components.math.gate": "math"},
        "rewards.components.math.gate = math: gates must not form a circle (math -> math). None of them could ever "
        "open. Remove one of these gates.",
    ),
    (
        "gates_are_other_components",
        {"rewards.components.math.gate": "routed"},
        "rewards.components.math.gate = routed: must not be routed where applies is routed",
    ),
    (
        "only_components_for_all_samples_choose_sources",
        {"rewards.components.math.where": {"source": ["gsm8k"]}},
        "rewards.components.math.where = {source}: needs applies: always. A routed component runs exactly where the "
        "record names it. Set applies to always, or remove where.",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math": {"path": "a.py:f", "url": "http://h", "style": "openrlhf"}},
        "rewards.components.math.url = http://h: must not be set together with path",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math.path": "a.py"},
        "rewards.components.math.path = a.py: must be package.module:function or file.py:function. This names no "
        "function. Add a colon and the name of the function.",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math": {"url": "http://h", "style": "verl"}},
        "rewards.components.math.style = verl: must be groupwise or openrlhf with url",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math": {"url": "h:80", "style": "openrlhf"}},
        "rewards.components.math.url = h:80: must begin with http:// or https://",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math.style": "verl"},
        "rewards.components.math.style = verl: needs path or url",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math.high": 2.0},
        "rewards.components.math.high = 2.0: needs path or url. A registered function declares its range with @reward",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math": {"path": "a.py:f", "low": 1.0, "high": 1.0}},
        "rewards.components.math.low = 1.0: must be below high = 1.0",
    ),
    (
        "brought_rewards_are_complete",
        {"rewards.components.math.conversational": False},
        "rewards.components.math.conversational = false: needs style: trl",
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
        "engine_arguments_have_one_place",
        {"rollouts.engine_args": {"max_num_seqs": 8}},
        "rollouts.engine_args.max_num_seqs = 8: must not be set here. Another key sets it. Set "
        "rollouts.max_concurrent_samples",
    ),
    (
        "engine_arguments_have_one_place",
        {"rollouts.engine_args": {"logprobs_mode": "raw_logits"}},
        "rollouts.engine_args.logprobs_mode = raw_logits: must not be set",
    ),
    (
        "engine_arguments_have_one_place",
        {"rollouts.engine_args": {"block-size": 32}},
        "rollouts.engine_args.block-size = 32: must be vLLM's name of the argument. It has underscores. Write "
        "block_size",
    ),
    (
        "groups_are_kept_no_longer_than_they_may_train",
        {"rollouts.pipeline_depth": 2},
        "rollouts.pipeline_depth = 2: must be at most rollouts.max_staleness + 1 = 1",
    ),
    (
        "only_stale_groups_are_late",
        {"rollouts.late_groups": "mask"},
        "rollouts.late_groups = mask: needs rollouts.max_staleness of 1 or more",
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
    assert only_problem(changes, REWARD_NAMES).startswith(wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {**SFT_ONLY, "algorithm.name": "sft", "rollouts.top_p": 0.9, "rollouts.group_size": 1},
        {"stages.rl.updates_per_step": 2, "stages.rl.optimizer.warmup_steps": 10},
        {"rollouts.max_completion_tokens": 248},
        {"model.hidden_size": 96, "model.heads": 6, "model.kv_heads": 3, "rollouts.tensor_parallel_size": 6},
        {"training.ranks": 4, "stages.sft.batch_size": 4},
        {"training.token_budget": 256},
        {"rollouts.engine_args": {"block_size": 32, "enable_prefix_caching": False}},
        {"model.max_context_tokens": 8192},  # the budget grows with it
        {"training.offload_parameters": True, "training.offload_optimizer": True, "training.zero_stage": 3},
        {"rewards.components.length": {"applies": "always", "weight": -0.1}},
        {"weight_sync.transport": "my_package.sync:Transport"},
        {**WITH_GPUS, "weight_sync.transport": "nccl"},
        COLOCATED,
        {**COLOCATED, "weight_sync.transport": "cuda_ipc"},
        {**WITH_GPUS, "weight_sync.transport": "ray"},
        {"evaluation.pass_at": [8]},
        {"stages.collect": COLLECT, "stages.preference": preference("collect", "dpo")},
        {"stages.collect": {**COLLECT, "produce": "groups"}, "stages.preference": preference("collect", "grouper")},
        {"stages.preference": FROM_A_FILE, "algorithm.name": "grpo"},
        {"stages.collect": COLLECT, "stages.more": {**COLLECT, "reuse": "collect", "reuse_fraction": 0.5}},
        {"stages.collect": {**COLLECT, "group_size": 4, "samples_per_prompt": 3}},  # pairs have no group_size
        {"stages.collect": {**COLLECT, "weights": {"math": 1.0, "math/format": 0.5}}},
        {"rewards.components.math": {"weight_schedule": [[0, 0.0], [10, 1.0]]}},
        {"rewards.components.math": {"path": "folder/a-b.py:f", "style": "trl", "conversational": False, "low": 0.0}},
        {"rewards.components.math": {"url": "https://h:80/get_reward", "style": "openrlhf"}},
        {"rewards.components.format": {"applies": "always", "gate": "routed", "where": {"source": ["a", 3]}}},
        {"stages.filter": {"kind": "filter", "drop_at_most": 6}},
        {"stages.sft.reasoning_token_ratio": 1.5},
        {"algorithm.name": "agapo", "algorithm.correction": {"kind": "tis_sequence"}, "rollouts.max_staleness": 1},
        {"algorithm.name": "agapo_offpolicy", "rollouts.max_staleness": 1, "stages.rl.updates_per_step": 2},
        {"algorithm.name": "gspo", "rollouts.top_p": 0.9},  # without a correction nothing compares with the engine
        {**SFT_ONLY, "algorithm.name": "dpo"},
        {"algorithm.name": "dpo", "stages.rl.algorithm": {"name": "grpo"}, "stages.preference": FROM_A_FILE},
    ],
)
def test_what_a_rule_allows_passes(changes: dict[str, Any]) -> None:
    validate(changed(changes))


def test_the_nearest_valid_values_of_a_division_are_listed() -> None:
    found = only_problem({"stages.rl.updates_per_step": 7})
    assert found.endswith("Nearest valid: 63 or 70; or updates_per_step of 2, 4, 8.")


def test_every_gate_of_a_circle_is_named() -> None:
    always = {"applies": "always"}
    parts = {"a": {"gate": "b", **always}, "b": {"gate": "a", **always}, "c": {"gate": "a", **always}}
    found = problems_of({f"rewards.components.{name}": part for name, part in parts.items()})
    assert [problem.partition(" must not form a circle ")[2].partition(".")[0] for problem in found] == [
        "(a -> b -> a)",
        "(b -> a -> b)",
    ]


def test_a_component_with_a_function_of_its_own_needs_no_registered_name() -> None:
    validate(changed({"rewards.components.mine": {"path": "a.py:f", "style": "verl"}}), ["math"])


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
