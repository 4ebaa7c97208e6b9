"""Rules that cross the sections of a run config. Each is a small function that yields one message per broken rule.

A rule names the sections it reads as its parameters; `check` runs every rule whose sections are all valid, so one wrong
field does not hide the rest. Besides the sections of RunConfig a rule may ask for `reward_names`, and for `algorithms`:
by stage, those that could be built.
"""

from __future__ import annotations

import inspect
import math
import netrc
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rlhf.algorithms import Algorithm
from rlhf.config import (
    ROUTED,
    ClusterConfig,
    CollectStage,
    EvaluationConfig,
    Exaone4TinyModel,
    FilterStage,
    ModelConfig,
    PreferenceStage,
    RewardComponent,
    RewardsConfig,
    RlStage,
    RolloutsConfig,
    ServerConfig,
    SftStage,
    StageConfig,
    TrackingConfig,
    TrainingConfig,
    TrainingStage,
    WeightSyncConfig,
)
from rlhf.errors import did_you_mean
from rlhf.servers import FIXED_FLAGS, GIVEN_BY_SERVER, KINDS, OWN_FLAGS, asked

Messages = Iterator[str]
Rule = Callable[..., Messages]
Stages = Mapping[str, StageConfig]
Servers = Mapping[str, ServerConfig]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The algorithm of a stage, built; `key` is where the config chooses it."""

    key: str
    name: str
    algorithm: Algorithm


Algorithms = Mapping[str, Chosen]

MIN_PROMPT_TOKENS = 8
TRANSPORTS = ("auto", "ray", "nccl", "cuda_ipc")
RESERVED_STAGE_NAMES = ("before",)  # the evaluation ahead of the first stage

_SERVER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FUNCTION_PATH = re.compile(r"(.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_rules: list[Rule] = []


def check(known: Mapping[str, Any]) -> list[str]:
    """The messages of every rule whose parameters are all in `known`, in the order the rules are written."""
    messages: list[str] = []
    for function in _rules:
        wanted = inspect.signature(function).parameters
        if wanted.keys() <= known.keys():
            messages += function(**{name: known[name] for name in wanted})
    return messages


def problem(key: str, value: object, rule: str, reason: str, fix: str) -> str:
    """The form every message about a config has: `key = value: rule. reason. fix.`"""
    return f"{key} = {value}: {rule}. {reason}. {fix}{'' if fix.endswith('?') else '.'}"


def _rule(function: Rule) -> Rule:
    _rules.append(function)
    return function


# --- stages -----------------------------------------------------------------------------------------------------------


@_rule
def stage_names_are_safe(stages: Stages) -> Messages:
    for name in stages:
        if not _STAGE_NAME.fullmatch(name):
            rule = "a stage name must be letters, digits, _ and -, and start with a letter or digit"
            reason = "It names folders, and metrics up to the first slash"
            yield problem(f"stages.{name}", "{...}", rule, reason, "Rename the stage")
        if name in RESERVED_STAGE_NAMES:
            reason = "That is the evaluation ahead of the first stage"
            yield problem(f"stages.{name}", "{...}", f"a stage must not be called {name}", reason, "Rename the stage")


@_rule
def stage_names_differ_without_case(stages: Stages) -> Messages:
    seen: dict[str, str] = {}
    for name in stages:
        first = seen.setdefault(name.casefold(), name)
        if first != name:
            rule = f"must differ from stages.{first} in more than upper and lower case"
            reason = "On some file systems both would write to one folder"
            yield problem(f"stages.{name}", "{...}", rule, reason, "Rename one of them")


@_rule
def warm_up_fits_the_stage(stages: Stages) -> Messages:
    for name, stage in stages.items():
        if not isinstance(stage, SftStage | RlStage):
            continue
        updates = stage.steps * (stage.updates_per_step if isinstance(stage, RlStage) else 1)
        if stage.optimizer.warmup_steps > updates:
            key = f"stages.{name}.optimizer.warmup_steps"
            rule = f"must be at most the stage's {updates} optimiser steps"
            reason = "The full learning rate would never be reached"
            yield problem(key, stage.optimizer.warmup_steps, rule, reason, f"Set it to {updates} or less")


@_rule
def learning_rate_ends_below_its_start(stages: Stages) -> Messages:
    for name, stage in _training(stages):
        lowest = stage.optimizer.min_learning_rate
        highest = stage.optimizer.learning_rate
        if lowest > highest:
            key = f"stages.{name}.optimizer.min_learning_rate"
            rule = f"must be at most learning_rate = {highest}"
            reason = "The schedule falls from one to the other"
            yield problem(key, lowest, rule, reason, f"Set it to {highest} or less")


@_rule
def betas_are_decay_rates(stages: Stages) -> Messages:
    for name, stage in _training(stages):
        if not all(0.0 <= beta < 1.0 for beta in stage.optimizer.betas):
            key = f"stages.{name}.optimizer.betas"
            betas = list(stage.optimizer.betas)
            rule = "both must be >= 0 and < 1"
            reason = "They are decay rates of running means"
            yield problem(key, betas, rule, reason, "The usual values are [0.9, 0.999]")


@_rule
def prompts_divide_into_updates(stages: Stages) -> Messages:
    for name, stage in _rl(stages):
        prompts = stage.prompts_per_step
        updates = stage.updates_per_step
        if prompts % updates:
            lower = prompts - prompts % updates
            near = [str(value) for value in (lower, lower + updates) if value]
            divisors = ", ".join(str(n) for n in _nearest(_divisors(prompts), updates, 3))
            rule = f"must be divisible by updates_per_step = {updates}"
            reason = "Every optimiser step of a rollout step trains on as many groups as the others"
            fix = f"Nearest valid: {' or '.join(near)}; or updates_per_step of {divisors}"
            yield problem(f"stages.{name}.prompts_per_step", prompts, rule, reason, fix)


# --- algorithm --------------------------------------------------------------------------------------------------------


@_rule
def every_stage_has_an_algorithm_for_its_data(stages: Stages, algorithms: Algorithms) -> Messages:
    for name, chosen in algorithms.items():
        stage = stages[name]
        data = chosen.algorithm.needs.data
        if isinstance(stage, RlStage) and data != "rollouts":
            rule = f"must be an algorithm that trains on rollouts, because stage {name} is of kind rl"
            yield problem(f"{chosen.key}.name", chosen.name, rule, f"This one trains on {data}", "Choose one of them, "
                          "such as grpo_icepop, or give the stage an algorithm of its own")  # fmt: skip
        if isinstance(stage, PreferenceStage) and data not in ("pairs", "groups"):
            rule = f"must be an algorithm over stored completions, because stage {name} is of kind preference"
            fix = "Choose dpo, simper or grouper, or give the stage an algorithm of its own"
            yield problem(f"{chosen.key}.name", chosen.name, rule, f"This one trains on {data}", fix)


@_rule
def preference_stages_follow_what_they_train_on(stages: Stages, algorithms: Algorithms) -> Messages:
    names = list(stages)
    for place, (name, stage) in enumerate(stages.items()):
        if not isinstance(stage, PreferenceStage) or not isinstance(stage.data, str):
            continue
        earlier = {n: s for n in names[:place] if isinstance(s := stages[n], CollectStage)}
        source = earlier.get(stage.data)
        if source is None:
            rule = "must be the name of an earlier stage of kind collect, or a file as {kind, path}"
            reason = "Its pairs or groups must exist when this stage begins"
            fix = did_you_mean(stage.data, earlier, f"Earlier ones: {', '.join(earlier) or 'none'}")
            yield problem(f"stages.{name}.data", stage.data, rule, reason, fix)
            continue
        chosen = algorithms.get(name)
        wanted = chosen.algorithm.needs.data if chosen else source.produce
        if chosen and wanted in ("pairs", "groups") and wanted != source.produce:
            rule = f"must be {wanted}, because stage {name} trains {chosen.name} on them"
            key = f"stages.{stage.data}.produce"
            yield problem(key, source.produce, rule, "The algorithm has no use for others", f"Set it to {wanted}")


@_rule
def collected_data_is_reused_from_its_like(stages: Stages) -> Messages:
    names = list(stages)
    for place, (name, stage) in enumerate(stages.items()):
        if not isinstance(stage, CollectStage):
            continue
        earlier = {n: s for n in names[:place] if isinstance(s := stages[n], CollectStage)}
        key = f"stages.{name}.reuse"
        if stage.reuse is None:
            if stage.reuse_fraction:
                reason = "Nothing says which stage's records to mix in"
                yield problem(f"{key}_fraction", stage.reuse_fraction, "needs reuse", reason, f"Set {key}")
        elif not stage.reuse_fraction:
            reason = "None of its records would be mixed in"
            yield problem(key, stage.reuse, "needs reuse_fraction above 0", reason, f"Set {key}_fraction")
        elif stage.reuse not in earlier:
            fix = did_you_mean(stage.reuse, earlier, f"Earlier ones: {', '.join(earlier) or 'none'}")
            rule = "must be an earlier stage of kind collect"
            reason = "Its records must exist by then"
            yield problem(key, stage.reuse, rule, reason, fix)
        elif earlier[stage.reuse].produce != stage.produce:
            rule = f"must be a stage with produce = {stage.produce}"
            yield problem(key, stage.reuse, rule, "Pairs and groups do not mix", "Make both the same")
        if stage.reuse_fraction >= 1.0:
            reason = "Some records must come from this stage"
            yield problem(f"{key}_fraction", stage.reuse_fraction, "must be below 1", reason, "Lower it")


@_rule
def collected_groups_fit_their_samples(stages: Stages) -> Messages:
    for name, stage in stages.items():
        if (
            isinstance(stage, CollectStage)
            and stage.produce == "groups"
            and stage.group_size > stage.samples_per_prompt
        ):
            rule = f"must be at most samples_per_prompt = {stage.samples_per_prompt}"
            reason = "A group is picked from the samples of one prompt"
            yield problem(f"stages.{name}.group_size", stage.group_size, rule, reason, f"Set it to "
                          f"{stage.samples_per_prompt} or less")  # fmt: skip


@_rule
def collected_parts_are_rewards(stages: Stages, rewards: RewardsConfig) -> Messages:
    for name, stage in _collect(stages):
        for part in stage.weights:
            component = part.partition("/")[0]
            if component not in rewards.components:
                reason = "No component of this name is in rewards.components"
                fix = did_you_mean(component, rewards.components, f"There are {', '.join(rewards.components)}")
                rule = "must be a reward component, or component/part"
                yield problem(f"stages.{name}.weights.{part}", stage.weights[part], rule, reason, fix)


@_rule
def filters_leave_something(stages: Stages) -> Messages:
    for name, stage in stages.items():
        if not isinstance(stage, FilterStage):
            continue
        high = stage.samples_per_prompt if stage.drop_at_least is None else stage.drop_at_least
        if high > stage.samples_per_prompt:
            rule = f"must be at most samples_per_prompt = {stage.samples_per_prompt}"
            reason = "No prompt has so many"
            yield problem(f"stages.{name}.drop_at_least", high, rule, reason, "Lower it")
        if stage.drop_at_most is not None and stage.drop_at_most >= high - 1:
            rule = f"must be below drop_at_least - 1 = {high - 1}"
            reason = "Every prompt would be dropped, as too hard or as too easy"
            yield problem(f"stages.{name}.drop_at_most", stage.drop_at_most, rule, reason, "Lower it or leave it out")


@_rule
def token_ratio_replaces_the_fraction(stages: Stages) -> Messages:
    for name, stage in stages.items():
        if (
            isinstance(stage, SftStage)
            and stage.reasoning_token_ratio
            # A config that was written down names every field.
            and stage.reasoning_fraction != SftStage.model_fields["reasoning_fraction"].default
        ):
            rule = "must not be set together with reasoning_token_ratio"
            reason = "Both say how much of the training is in reasoning mode"
            yield problem(f"stages.{name}.reasoning_fraction", stage.reasoning_fraction, rule, reason, "Remove one")


@_rule
def corrected_ratios_need_the_full_vocabulary(
    stages: Stages, rollouts: RolloutsConfig, algorithms: Algorithms
) -> Messages:
    names = [c.name for stage, c in algorithms.items() if c.algorithm.needs.importance_ratio]
    if not names:
        return
    reason = "The learner's probabilities are over all tokens; over part of them the importance ratio is biased"
    if rollouts.top_p < 1.0:
        yield problem("rollouts.top_p", rollouts.top_p, f"must be 1.0 with {names[0]}", reason, "Set it to 1.0")
    if rollouts.top_k > 0:
        yield problem("rollouts.top_k", rollouts.top_k, f"must be 0 with {names[0]}", reason, "Set it to 0")


@_rule
def group_baselines_need_two_samples(rollouts: RolloutsConfig, algorithms: Algorithms) -> Messages:
    names = [c.name for c in algorithms.values() if c.algorithm.needs.group_baseline]
    if names and rollouts.group_size < 2:
        reason = "A sample is compared with the others of its group; alone, its advantage is always 0"
        fix = "Set it to 2 or more; 8 is usual"
        yield problem("rollouts.group_size", rollouts.group_size, f"must be >= 2 with {names[0]}", reason, fix)


@_rule
def algorithms_without_a_ratio_stay_on_policy(
    stages: Stages, rollouts: RolloutsConfig, algorithms: Algorithms
) -> Messages:
    for name, chosen in algorithms.items():
        stage = stages[name]
        if not isinstance(stage, RlStage) or not chosen.algorithm.needs.on_policy:
            continue
        reason = f"{chosen.name} has no ratio to the policy that sampled, so later updates would be biased"
        if stage.updates_per_step > 1:
            key = f"stages.{name}.updates_per_step"
            yield problem(key, stage.updates_per_step, f"must be 1 with {chosen.name}", reason, "Set it to 1")
        if rollouts.max_staleness and not chosen.algorithm.needs.importance_ratio:
            rule = f"must be 0 with {chosen.name} and no correction"
            fix = f"Set it to 0, or {chosen.key}.correction.kind to tis_sequence"
            yield problem("rollouts.max_staleness", rollouts.max_staleness, rule, reason, fix)


# --- model and rollouts -----------------------------------------------------------------------------------------------


@_rule
def context_has_room_for_the_prompt(model: ModelConfig, rollouts: RolloutsConfig) -> Messages:
    context = model.max_context_tokens
    completion = rollouts.max_completion_tokens
    left = context - completion
    if left < MIN_PROMPT_TOKENS:
        rule = f"must leave at least {MIN_PROMPT_TOKENS} of model.max_context_tokens = {context} to the prompt"
        reason = f"{left} tokens remain" if left >= 0 else f"The completion alone takes {-left} more than there are"
        fix = f"Raise model.max_context_tokens to at least {completion + MIN_PROMPT_TOKENS}"
        if context > MIN_PROMPT_TOKENS:
            fix = f"Set it to at most {context - MIN_PROMPT_TOKENS}; or r{fix[1:]}"
        yield problem("rollouts.max_completion_tokens", completion, rule, reason, fix)


@_rule
def heads_divide_the_model(model: ModelConfig) -> Messages:
    if not isinstance(model, Exaone4TinyModel):
        return
    hidden = model.hidden_size
    heads = model.heads
    kv_heads = model.kv_heads
    if heads % kv_heads:
        rule = f"must divide model.heads = {heads}"
        reason = "Equally many query heads share each key-value head"
        yield problem("model.kv_heads", kv_heads, rule, reason, f"Nearest valid: {_listed(_divisors(heads), kv_heads)}")
    if hidden % heads:
        rule = f"must be divisible by model.heads = {heads}"
        reason = "The heads share it equally"
        lower = hidden - hidden % (2 * heads)
        fix = f"Nearest valid: {_listed([n for n in (lower, lower + 2 * heads) if n], hidden)}"
        yield problem("model.hidden_size", hidden, rule, reason, fix)
    elif hidden // heads % 2:
        rule = f"model.hidden_size / model.heads must be even, and is {hidden // heads}"
        reason = "Rotary positions turn pairs of dimensions"
        yield problem("model.hidden_size", hidden, rule, reason, f"Nearest valid: {hidden - heads} or {hidden + heads}")


@_rule
def tensor_parallel_divides_the_heads(model: ModelConfig, rollouts: RolloutsConfig) -> Messages:
    if not isinstance(model, Exaone4TinyModel):
        return
    size = rollouts.tensor_parallel_size
    heads = model.heads
    kv_heads = model.kv_heads
    if heads % size or (kv_heads % size and size % kv_heads):
        rule = f"must divide model.heads = {heads}, and divide or be a multiple of model.kv_heads = {kv_heads}"
        valid = [n for n in _divisors(heads) if not kv_heads % n or not n % kv_heads]
        reason = "Every shard of an engine holds whole heads"
        yield problem("rollouts.tensor_parallel_size", size, rule, reason, f"Nearest valid: {_listed(valid, size)}")


# --- training ---------------------------------------------------------------------------------------------------------


@_rule
def every_offline_rank_has_a_row(stages: Stages, training: TrainingConfig) -> Messages:
    for name, stage in stages.items():
        if isinstance(stage, SftStage | PreferenceStage) and training.ranks > stage.batch_size:
            rows = f"stages.{name}.batch_size = {stage.batch_size}"
            yield _too_many_ranks(training.ranks, stage.batch_size, rows)


@_rule
def every_rl_rank_has_a_row(stages: Stages, training: TrainingConfig, rollouts: RolloutsConfig) -> Messages:
    for name, stage in _rl(stages):
        rows = stage.prompts_per_step * rollouts.group_size // stage.updates_per_step
        if training.ranks > rows:
            arithmetic = (
                f"stages.{name}.prompts_per_step {stage.prompts_per_step} x rollouts.group_size {rollouts.group_size} "
                f"/ updates_per_step {stage.updates_per_step} = {rows}"
            )
            yield _too_many_ranks(training.ranks, rows, arithmetic)


@_rule
def token_budget_holds_the_longest_sequence(training: TrainingConfig, model: ModelConfig) -> Messages:
    budget = training.token_budget
    longest = model.max_context_tokens
    if budget is not None and budget < longest:
        rule = f"must be at least model.max_context_tokens = {longest}"
        reason = "A sequence is never split, so a longer one would exceed the memory that the budget allows"
        fix = f"Set it to {longest} or more, leave it out, or lower model.max_context_tokens"
        yield problem("training.token_budget", budget, rule, reason, fix)


@_rule
def offload_needs_its_zero_stage(training: TrainingConfig) -> Messages:
    for key, wanted, what in (
        ("offload_optimizer", 2, "optimiser states and gradients"),
        ("offload_parameters", 3, "parameters"),
    ):
        if getattr(training, key) and training.zero_stage < wanted:
            rule = f"needs training.zero_stage >= {wanted}, and it is {training.zero_stage}"
            reason = f"Only what ZeRO partitions can be offloaded, and {what} are partitioned from stage {wanted} on"
            fix = f"Set training.zero_stage to {wanted}, or training.{key} to false"
            yield problem(f"training.{key}", "true", rule, reason, fix)


def _too_many_ranks(ranks: int, rows: int, arithmetic: str) -> str:
    rule = f"must be at most the rows of one optimiser step, {arithmetic}"
    reason = "A rank without a row only waits for the others"
    return problem("training.ranks", ranks, rule, reason, f"Set it to {max(rows, 1)} or less, or train on more rows")


# --- rewards and evaluation -------------------------------------------------------------------------------------------


@_rule
def rl_has_a_routed_reward(stages: Stages, rewards: RewardsConfig) -> Messages:
    if _scored(stages) and all(part.applies == "always" for part in rewards.components.values()):
        rule = "stages that score samples need at least one component with applies: routed"
        reason = "Each record names the reward that verifies its answer, and only a routed one can be named"
        fix = "Set applies: routed on the component that the records name"
        yield problem("rewards.components", _braced(rewards.components), rule, reason, fix)


@_rule
def reward_weights_train_something(rewards: RewardsConfig) -> Messages:
    for name, part in rewards.components.items():
        if not math.isfinite(part.weight):
            key = f"rewards.components.{name}.weight"
            reason = "It multiplies every reward"
            yield problem(key, part.weight, "must be a finite number", reason, "The usual value is 1.0")
    if all(not any(part.weights) for part in rewards.components.values()):
        weights = ", ".join(f"{name}.weight = 0" for name in rewards.components)
        rule = f"at least one weight must differ from 0 ({weights})"
        reason = "Every reward would be 0"
        yield problem("rewards.components", _braced(rewards.components), rule, reason, "Give one a weight, such as 1.0")


@_rule
def correctness_threshold_is_finite(rewards: RewardsConfig) -> Messages:
    if not math.isfinite(rewards.correct_at):
        reason = "A sample is correct when its task value reaches it"
        yield problem("rewards.correct_at", rewards.correct_at, "must be a finite number", reason, "The default is 1.0")


@_rule
def no_component_is_called_routed(rewards: RewardsConfig) -> Messages:
    if ROUTED in rewards.components:
        rule = f"a component must not be called {ROUTED}"
        reason = "As a gate this is the one that the record names"
        yield problem(f"rewards.components.{ROUTED}", "{...}", rule, reason, "Rename it")


@_rule
def weight_schedules_rise_in_steps(rewards: RewardsConfig) -> Messages:
    for name, part in rewards.components.items():
        key = f"rewards.components.{name}.weight_schedule"
        points = part.weight_schedule
        shown = [list(point) for point in points]
        steps = [step for step, _ in points]
        if points and part.weight != RewardComponent.model_fields["weight"].default:
            rule = "must not be set together with weight_schedule"
            reason = "Both say what the part weighs"
            yield problem(f"rewards.components.{name}.weight", part.weight, rule, reason, "Remove one")
        if steps != sorted(set(steps)) or (steps and steps[0] < 0):
            rule = "steps must be >= 0 and rise"
            reason = "Between two points the weight is linear"
            yield problem(key, shown, rule, reason, "Sort the points by step, each step once")
        if not all(math.isfinite(weight) for _, weight in points):
            yield problem(key, shown, "weights must be finite numbers", "They multiply the reward", "Correct them")


@_rule
def gates_are_other_components(rewards: RewardsConfig) -> Messages:
    parts = rewards.components
    for name, part in parts.items():
        key = f"rewards.components.{name}.gate"
        gate = part.gate
        if gate is None:
            continue
        if gate == ROUTED and part.applies == "routed":
            reason = "Where it runs it is that one itself"
            yield problem(key, gate, "must not be routed where applies is routed", reason, "Name another component")
        elif gate != ROUTED and gate not in parts:
            reason = "No component of this name is in rewards.components"
            fix = did_you_mean(gate, [*parts, ROUTED], f"There are {', '.join(parts)} and {ROUTED}")
            yield problem(key, gate, f"must be a component or {ROUTED}", reason, fix)
        elif cycle := _gate_cycle(parts, name):
            rule = f"gates must not form a circle ({' -> '.join(cycle)})"
            reason = "None of them could ever open"
            yield problem(key, gate, rule, reason, "Remove one of these gates")


def _gate_cycle(parts: Mapping[str, RewardComponent], name: str) -> list[str]:
    """The way from `name` along its gates back to `name`; empty where it does not lead there."""
    way = [name]
    gate = parts[name].gate
    while gate is not None and gate in parts and gate not in way[1:]:
        way.append(gate)
        if gate == name:
            return way
        gate = parts[gate].gate
    return []


@_rule
def only_components_for_all_samples_choose_sources(rewards: RewardsConfig) -> Messages:
    for name, part in rewards.components.items():
        if part.where and part.applies == "routed":
            key, reason = (
                f"rewards.components.{name}.where",
                "A routed component runs exactly where the record names it",
            )
            fix = "Set applies to always, or remove where"
            yield problem(key, _braced(part.where), "needs applies: always", reason, fix)


@_rule
def brought_rewards_are_complete(rewards: RewardsConfig) -> Messages:
    for name, part in rewards.components.items():
        key = f"rewards.components.{name}"
        if part.path is not None and part.url is not None:
            yield problem(
                f"{key}.url", part.url, "must not be set together with path", "Both give values", "Remove one"
            )
        if part.path is not None and not _FUNCTION_PATH.fullmatch(part.path):
            rule = "must be package.module:function or file.py:function"
            reason = "This names no function"
            yield problem(f"{key}.path", part.path, rule, reason, "Add a colon and the name of the function")
        if part.url is not None and part.style not in ("groupwise", "openrlhf"):
            rule = "must be groupwise or openrlhf with url"
            reason = "These protocols are spoken over HTTP"
            yield problem(f"{key}.style", part.style, rule, reason, "Remove it for a `python -m rewards serve`")
        if part.url is not None and urlparse(part.url).scheme not in ("http", "https"):
            yield problem(
                f"{key}.url", part.url, "must begin with http:// or https://", "It is posted to", "Correct it"
            )
        if part.registered and part.style != "groupwise":
            reason = "A registered function is of this program's own style"
            yield problem(f"{key}.style", part.style, "needs path or url", reason, "Name the function in path")
        yield from _range_problems(key, part)


def _range_problems(key: str, part: RewardComponent) -> Messages:
    if part.registered and (part.low is not None or part.high is not None):
        end = "low" if part.low is not None else "high"
        reason = "A registered function declares its range with @reward"
        yield problem(f"{key}.{end}", getattr(part, end), "needs path or url", reason, "Remove it")
    low = -math.inf if part.low is None else part.low
    high = math.inf if part.high is None else part.high
    if not low < high:
        yield problem(f"{key}.low", low, f"must be below high = {high}", "No value lies between", "Correct them")
    if not part.conversational and part.style != "trl":
        reason = "Only functions of TRL get prompts in two forms"
        yield problem(f"{key}.conversational", "false", "needs style: trl", reason, "Remove it")


@_rule
def reward_components_exist(rewards: RewardsConfig, reward_names: Sequence[str] | None) -> Messages:
    for name in rewards.components if reward_names is not None else ():
        if rewards.components[name].registered and name not in (reward_names or ()):
            known = sorted(reward_names or ())
            otherwise = f"Registered: {', '.join(known)}; rewards.modules can register more"
            reason = "No module registered a reward of this name"
            fix = did_you_mean(name, known, otherwise)
            yield problem(f"rewards.components.{name}", "{...}", "must be a registered reward", reason, fix)


# --- servers ----------------------------------------------------------------------------------------------------------


@_rule
def server_names_are_safe(servers: Servers) -> Messages:
    for name in servers:
        if not _SERVER_NAME.fullmatch(name):
            rule = "a server name must be letters, digits, _ and -, and start with a letter or digit"
            yield problem(f"servers.{name}", "{...}", rule, "It names a log file and metrics", "Rename the server")


@_rule
def servers_that_are_asked_exist(servers: Servers, rewards: RewardsConfig) -> Messages:
    for ask in asked(rewards):
        if ask.server not in servers:
            reason = "No server of this name is in servers"
            fix = did_you_mean(ask.server, servers, f"There are {', '.join(servers) or 'none'}")
            yield problem(f"{ask.key}.server", ask.server, "must be one of servers", reason, fix)


@_rule
def every_server_is_asked(servers: Servers, rewards: RewardsConfig) -> Messages:
    wanted = {ask.server for ask in asked(rewards)}
    for name in servers:
        if name not in wanted:
            rule = "must be asked by a reward"
            reason = "It would hold its share of the machine for nothing"
            fix = f"Set endpoint.server: {name} in the params of a component, or remove the server"
            yield problem(f"servers.{name}", "{...}", rule, reason, fix)


@_rule
def servers_are_of_the_kind_that_is_asked(servers: Servers, rewards: RewardsConfig) -> Messages:
    for ask in asked(rewards):
        wanted = KINDS.get(ask.component) if rewards.components[ask.component].registered else None
        if wanted and ask.server in servers and servers[ask.server].kind != wanted:
            key = f"servers.{ask.server}.kind"
            kind = servers[ask.server].kind
            reason = f"{ask.key}.server names it, and {ask.component} asks {_PATHS[wanted]}"
            yield problem(key, kind, f"must be {wanted}", reason, f"Set it to {wanted}, or name another server")


_PATHS = {"chat": "/v1/chat/completions", "reward_model": "/classify"}


@_rule
def an_endpoint_is_of_the_run_or_elsewhere(rewards: RewardsConfig) -> Messages:
    for ask in asked(rewards):
        for name in GIVEN_BY_SERVER:
            if ask.endpoint.get(name) is not None:
                key = f"{ask.key}.{name}"
                rule = f"must be null with server: {ask.server}"
                yield problem(key, ask.endpoint[name], rule, "The server of the run says it", "Remove one of the two")


@_rule
def replies_fit_the_context_of_their_server(servers: Servers, rewards: RewardsConfig) -> Messages:
    for ask in asked(rewards):
        tokens = ask.endpoint.get("max_tokens", 0)
        context = getattr(servers.get(ask.server), "max_context_tokens", 0)
        if isinstance(tokens, int) and context and tokens >= context:
            rule = f"must be less than servers.{ask.server}.max_context_tokens = {context}"
            yield problem(f"{ask.key}.max_tokens", tokens, rule, "The question needs room too", "Lower it")


@_rule
def server_flags_have_one_place(servers: Servers) -> Messages:
    for name, server in servers.items():
        for flag, value in server.args.items():
            key = f"servers.{name}.args.{flag}"
            plain = flag.lstrip("-").replace("_", "-")
            if plain in OWN_FLAGS:
                fix = f"Set servers.{name}.{OWN_FLAGS[plain]}"
                yield problem(key, value, "must not be set here", "A field of the server sets it", fix)
            elif plain in FIXED_FLAGS:
                yield problem(
                    key, "...", "must not be set", "The run decides where a server is and who asks it", "Remove it"
                )
            elif plain != flag.replace("_", "-"):
                yield problem(key, value, "must be without leading hyphens", "They are added", f"Write {plain}")


@_rule
def servers_on_cpu_are_one_process(servers: Servers, cluster: ClusterConfig) -> Messages:
    for name, server in servers.items():
        if server.tensor_parallel_size > 1 and cluster.device == "cpu":
            key = f"servers.{name}.tensor_parallel_size"
            size = server.tensor_parallel_size
            reason = "It is the number of GPUs, and cluster.device is cpu"
            yield problem(key, size, "must be 1 on cpu", reason, "Set it to 1, or cluster.device to cuda")


@_rule
def pass_at_k_has_k_samples(evaluation: EvaluationConfig) -> Messages:
    too_large = [k for k in evaluation.pass_at if k > evaluation.samples_per_prompt]
    if too_large:
        rule = f"every k must be at most evaluation.samples_per_prompt = {evaluation.samples_per_prompt}"
        reason = f"pass@{too_large[0]} cannot be estimated from fewer samples"
        fix = f"Lower k, or set evaluation.samples_per_prompt to at least {max(too_large)}"
        yield problem("evaluation.pass_at", list(evaluation.pass_at), rule, reason, fix)


# --- engines ----------------------------------------------------------------------------------------------------------

OWN_ENGINE_ARGS = {
    "model": "model",
    "seed": "seed",
    "dtype": "model.dtype",
    "max_model_len": "model.max_context_tokens",
    "trust_remote_code": "model.trust_remote_code",
    "tensor_parallel_size": "rollouts.tensor_parallel_size",
    "max_num_seqs": "rollouts.max_concurrent_samples",
    "enable_sleep_mode": "cluster.placement",
}
"""vLLM's engine argument -> the key that sets it."""

FIXED_ENGINE_ARGS = (
    "distributed_executor_backend",
    "disable_log_stats",
    "enable_log_requests",
    "logprobs_mode",
    "skip_tokenizer_init",
    "weight_transfer_config",
    "worker_extension_cls",
)


@_rule
def engine_arguments_have_one_place(rollouts: RolloutsConfig) -> Messages:
    for name, value in rollouts.engine_args.items():
        key = f"rollouts.engine_args.{name}"
        plain = name.lstrip("-").replace("-", "_")
        if plain in OWN_ENGINE_ARGS:
            yield problem(key, value, "must not be set here", "Another key sets it", f"Set {OWN_ENGINE_ARGS[plain]}")
        elif plain in FIXED_ENGINE_ARGS:
            reason = "Sampling and weight sync rely on what the program sets"
            yield problem(key, value, "must not be set", reason, "Remove it")
        elif plain != name:
            yield problem(key, value, "must be vLLM's name of the argument", "It has underscores", f"Write {plain}")


@_rule
def groups_are_kept_no_longer_than_they_may_train(rollouts: RolloutsConfig) -> Messages:
    depth = rollouts.pipeline_depth
    staleness = rollouts.max_staleness
    if depth is not None and depth > staleness + 1:
        rule = f"must be at most rollouts.max_staleness + 1 = {staleness + 1}"
        reason = "A group that is dispatched earlier than that is too old when its step comes"
        yield problem("rollouts.pipeline_depth", depth, rule, reason, "Lower it or allow more staleness")


@_rule
def only_stale_groups_are_late(rollouts: RolloutsConfig) -> Messages:
    if rollouts.late_groups != "wait" and not rollouts.max_staleness:
        rule = "needs rollouts.max_staleness of 1 or more"
        reason = "Without staleness every group belongs to the step that dispatched it, and none is late"
        yield problem("rollouts.late_groups", rollouts.late_groups, rule, reason, "Set it to wait")


# --- weight sync and cluster ------------------------------------------------------------------------------------------


@_rule
def transport_has_a_known_name(weight_sync: WeightSyncConfig) -> Messages:
    name = weight_sync.transport
    if name not in TRANSPORTS and not _CLASS_PATH.fullmatch(name):
        rule = f"must be one of {', '.join(TRANSPORTS)}, or package.module:Class"
        reason = "No transport has this name"
        fix = did_you_mean(name, TRANSPORTS, "auto fits every placement")
        yield problem("weight_sync.transport", name, rule, reason, fix)


@_rule
def gpu_transports_need_gpus(weight_sync: WeightSyncConfig, cluster: ClusterConfig) -> Messages:
    reasons = {
        "nccl": "Without CUDA the NCCL communicator does nothing and reports success, so engines keep old weights",
        "cuda_ipc": "It passes handles of GPU memory, and there is none",
    }
    name = weight_sync.transport
    if name in reasons and cluster.device == "cpu":
        rule = "needs cluster.device = cuda, and it is cpu"
        yield problem("weight_sync.transport", name, rule, reasons[name], "Set it to auto or ray")


@_rule
def colocated_engines_pair_with_learners(
    cluster: ClusterConfig, rollouts: RolloutsConfig, training: TrainingConfig
) -> Messages:
    if cluster.placement != "colocated":
        return
    if rollouts.max_staleness:
        rule = "must be 0 with cluster.placement = colocated"
        reason = "Engines sleep while the learner trains, so nothing can be generated meanwhile"
        yield problem("rollouts.max_staleness", rollouts.max_staleness, rule, reason, "Set it to 0 or split the GPUs")
    if rollouts.tensor_parallel_size > 1:
        rule = "must be 1 with cluster.placement = colocated"
        reason = "Each engine shares the GPU of one learner rank"
        fix = "Set it to 1 or use cluster=gpu_split"
        yield problem("rollouts.tensor_parallel_size", rollouts.tensor_parallel_size, rule, reason, fix)
    if rollouts.num_engines != training.ranks:
        rule = f"must equal training.ranks = {training.ranks} with cluster.placement = colocated"
        reason = "Each engine shares the GPU of one learner rank and reads its memory"
        yield problem("rollouts.num_engines", rollouts.num_engines, rule, reason, f"Set it to {training.ranks}")


@_rule
def gpu_transports_fit_the_placement(weight_sync: WeightSyncConfig, cluster: ClusterConfig) -> Messages:
    wanted = {
        "nccl": ("split", "NCCL does not connect two processes that share a GPU"),
        "cuda_ipc": ("colocated", "A memory handle can only be opened on the GPU that it was made on"),
    }
    name = weight_sync.transport
    if name in wanted and cluster.device == "cuda" and cluster.placement != wanted[name][0]:
        rule = f"needs cluster.placement = {wanted[name][0]}, and it is {cluster.placement}"
        yield problem("weight_sync.transport", name, rule, wanted[name][1], "Set it to auto, which picks by placement")


@_rule
def only_gpus_are_shared(cluster: ClusterConfig) -> Messages:
    if cluster.placement == "colocated" and cluster.device == "cpu":
        rule = "needs cluster.device = cuda, and it is cpu"
        reason = "It is learners and engines taking turns on a GPU; on CPUs the operating system does that"
        yield problem("cluster.placement", "colocated", rule, reason, "Set it to split")


@_rule
def probes_fit_the_context(model: ModelConfig, weight_sync: WeightSyncConfig) -> Messages:
    tokens = weight_sync.attestation.probe_tokens
    context = model.max_context_tokens
    if tokens >= context:
        rule = f"must be less than model.max_context_tokens = {context}"
        reason = "An engine reads the probe as a prompt and samples one token after it"
        yield problem("weight_sync.attestation.probe_tokens", tokens, rule, reason, f"Set it to {context - 1} or less")


# --- tracking ---------------------------------------------------------------------------------------------------------


@_rule
def online_tracking_needs_a_key(tracking: TrackingConfig) -> Messages:
    if tracking.wandb.mode == "online" and not _has_wandb_key():
        rule = "needs an API key in WANDB_API_KEY or from `wandb login`"
        reason = "A run must not wait at a login prompt"
        fix = "Set the key, or use mode offline and upload later with `wandb sync`"
        yield problem("tracking.wandb.mode", "online", rule, reason, fix)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# --- words ------------------------------------------------------------------------------------------------------------


def _rl(stages: Stages) -> list[tuple[str, RlStage]]:
    return [(name, stage) for name, stage in stages.items() if isinstance(stage, RlStage)]


def _training(stages: Stages) -> list[tuple[str, TrainingStage]]:
    return [(name, stage) for name, stage in stages.items() if isinstance(stage, TrainingStage)]


def _collect(stages: Stages) -> list[tuple[str, CollectStage]]:
    return [(name, stage) for name, stage in stages.items() if isinstance(stage, CollectStage)]


def _scored(stages: Stages) -> list[str]:
    return [name for name, stage in stages.items() if isinstance(stage, RlStage | FilterStage | CollectStage)]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(valid: Sequence[int], value: int, count: int) -> list[int]:
    return sorted(sorted(valid, key=lambda n: abs(n - value))[:count])


def _listed(valid: Sequence[int], value: int) -> str:
    return " or ".join(str(n) for n in _nearest(valid, value, 2))


def _braced(names: Mapping[str, object]) -> str:
    return "{" + ", ".join(names) + "}"
