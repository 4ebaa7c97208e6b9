"""The second gate of a run config: what Hydra composed is checked in full before any process starts.

Every problem is reported at once, as `dotted.key = value: rule. reason. fix.` Rules within a field come from the schema
in `rlhf.config`, rules across sections from `rlhf.rules`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf import algorithms, rules
from rlhf.algorithms import Algorithm
from rlhf.config import AlgorithmConfig, RunConfig, StageConfig
from rlhf.errors import ConfigError
from rlhf.rules import did_you_mean, problem
from rlhf.schema import Schema, keys_of

ELSEWHERE = {
    "epochs": "steps",
    "lr": "learning_rate",
    "max_new_tokens": "max_completion_tokens",
    "max_tokens": "max_completion_tokens",
    "n": "group_size",
    "num_generations": "group_size",
    "num_gpus": "ranks",
    "top_n": "top_k",
    "world_size": "ranks",
}
"""What other trainers call a key -> what it is called here."""

_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def validate(raw: Mapping[str, Any], reward_names: Sequence[str] | None = None) -> RunConfig:
    """The checked config. ConfigError lists every problem of fields, algorithm and rules across sections.

    `reward_names` are the registered rewards; None leaves the names of reward components unchecked.
    """
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = list(_field_problems(error, raw))
        raise ConfigError([*problems, *_crossing(_valid_sections(raw), reward_names)]) from error
    if problems := broken_rules(config, reward_names):
        raise ConfigError(problems)
    return config


def broken_rules(config: RunConfig, reward_names: Sequence[str] | None = None) -> list[str]:
    """Messages of the algorithm's own checks and of all rules across sections; empty when the config can run."""
    return _crossing({name: getattr(config, name) for name in RunConfig.model_fields}, reward_names)


def check_run_root(config: RunConfig) -> int:
    """Free bytes where the run will be written. ConfigError when that cannot be written or has too little space.

    Nothing is created: the probe file lives for a moment in the nearest folder that exists.
    """
    root = Path(config.run_root).expanduser().absolute()
    folder = next(parent for parent in (root, *root.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        reason = f"{folder} refuses a new file: {error.strerror}"
        message = problem("run_root", config.run_root, "must be writable", reason, "Choose another folder")
        raise ConfigError([message]) from error
    if free < config.min_free_disk_mib * 2**20:
        rule = f"must have min_free_disk_mib = {config.min_free_disk_mib} MiB free"
        reason = f"{folder} has {free} bytes ({free // 2**20} MiB)"
        fix = "Free some, choose another run_root, or lower min_free_disk_mib"
        raise ConfigError([problem("run_root", config.run_root, rule, reason, fix)])
    return free


# --- sections that can be used ----------------------------------------------------------------------------------------


def _crossing(sections: Mapping[str, Any], reward_names: Sequence[str] | None) -> list[str]:
    known: dict[str, Any] = {**sections, "reward_names": reward_names}
    chosen: AlgorithmConfig | None = known.pop("algorithm", None)
    problems: list[str] = []
    if chosen is not None:
        algorithm, problems = _build(chosen)
        if algorithm is not None:
            known |= {"algorithm": algorithm, "algorithm_name": chosen.name}
    return problems + rules.check(known)


def _valid_sections(raw: Any) -> dict[str, Any]:
    """The sections that hold on their own, those left out at their defaults; of `stages` each stage that does."""
    if not isinstance(raw, Mapping):
        return {}
    sections = {}
    for name, field in RunConfig.model_fields.items():
        if name == "stages":
            sections[name] = _valid_stages(raw.get(name))
        elif name in raw:
            try:
                sections[name] = _adapter(name).validate_python(raw[name])
            except ValidationError:
                continue  # its problems are reported with those of the whole config
        elif not field.is_required():
            sections[name] = field.get_default(call_default_factory=True)
    return sections


def _valid_stages(raw: Any) -> dict[str, Any]:
    stages = {}
    for name, stage in raw.items() if isinstance(raw, Mapping) else ():
        try:
            stages[str(name)] = _stage_adapter().validate_python(stage)
        except ValidationError:
            continue  # as above
    return stages


@cache
def _adapter(section: str) -> TypeAdapter[Any]:
    field = RunConfig.model_fields[section]
    return TypeAdapter(field.rebuild_annotation())


@cache
def _stage_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(StageConfig)


def _build(chosen: AlgorithmConfig) -> tuple[Algorithm | None, list[str]]:
    try:
        return algorithms.build(chosen.name, chosen.hyperparameters), []
    except ConfigError as error:
        return None, error.problems
    except ValidationError as error:
        schema = _algorithm_schema(chosen.name)
        keys = [*(f"algorithm.{key}" for key in schema.properties), *keys_of(Schema.of(RunConfig), {})]
        return None, [_message(item, schema, keys, ("algorithm",)) for item in error.errors(include_url=False)]


def _algorithm_schema(name: str) -> Schema:
    """The algorithm's own fields; nothing known where one of them has no default."""
    try:
        return Schema.of(type(algorithms.build(name, {})))
    except (ConfigError, ValidationError):
        return Schema({}, {})


# --- pydantic's errors in the form of ours ----------------------------------------------------------------------------


def _field_problems(error: ValidationError, raw: Any) -> Iterator[str]:
    schema = Schema.of(RunConfig)
    keys = list(keys_of(schema, raw))
    chosen = raw.get("algorithm") if isinstance(raw, Mapping) else None
    if isinstance(chosen, Mapping):
        keys += [f"algorithm.{key}" for key in _algorithm_schema(str(chosen.get("name"))).properties]
    for item in error.errors(include_url=False):
        yield _message(item, schema, keys)


def _message(item: Any, schema: Schema, keys: Sequence[str], prefix: tuple[str, ...] = ()) -> str:
    """One pydantic error as one line. `keys` are the valid dotted keys of the whole config."""
    location, node, parent = schema.locate(item["loc"])
    path = (*prefix, *location)
    key, kind, value = ".".join(path) or "config", item["type"], item["input"]
    if kind == "extra_forbidden":
        rule = f"is not a key of {'.'.join(path[:-1]) or 'the run config'}"
        reason = "A typo must not pass for a setting"
        return problem(key, _shown(value), rule, reason, _other_key(path, list(parent.properties), keys))
    if kind.startswith("union_tag"):
        tags = node.tags
        given = item["ctx"].get("tag", "(missing)")
        reason = "It decides which other keys there are"
        fix = did_you_mean(str(given), tags, "Choose one of them")
        return problem(f"{key}.kind", given, f"must be one of {', '.join(tags)}", reason, fix)
    rule = f"must be {node.description}"
    if kind == "missing":
        return problem(key, "(missing)", rule, "It has no default", f"Add {key}")
    return problem(key, _shown(value), rule, *_reason_and_fix(item, node))


def _reason_and_fix(item: Any, node: Schema) -> tuple[str, str]:
    kind, value = item["type"], item["input"]
    default = f"Give such a value{node.default_hint}"
    if node.choices:
        return f"There is no {_shown(value)}", did_you_mean(str(value), node.choices, "Choose one of them")
    if kind in _RANGE:
        nearest = node.nearest(value)
        return "The value is out of range", default if nearest is None else f"The nearest valid value is {nearest}"
    if kind.endswith(("_type", "_parsing", "_from_float")):
        return f"This is {_kind(value)}", default
    if kind == "string_pattern_mismatch":
        return "This text does not match", "Rename it"
    if kind == "too_short":
        return "There are too few entries", "Add one"
    return item["msg"].rstrip("."), default


def _other_key(path: tuple[str, ...], siblings: Sequence[str], keys: Sequence[str]) -> str:
    """The nearest valid key: of this name at this level or another one, else of a similar name here or elsewhere."""
    own, *parents = reversed(path)
    prefix, name = ".".join(reversed(parents)), ELSEWHERE.get(own, own)
    here = {f"{prefix}.{sibling}".lstrip("."): sibling for sibling in siblings}
    last = {key: key.rpartition(".")[2] for key in keys}
    same = [key for key, leaf in here.items() if leaf == name] or [key for key, leaf in last.items() if leaf == name]
    if not same:
        near = get_close_matches(name, siblings, n=1) or get_close_matches(name, set(last.values()), n=1, cutoff=0.75)
        places = here if near and near[0] in siblings else last
        same = [key for key, leaf in places.items() if leaf == near[0]] if near else []
    if same:
        closest = sorted(same, key=lambda key: (-_shared_parents(key, prefix), key.count(".")))
        return f"Did you mean {' or '.join(closest[:2])}?"
    return f"Valid keys: {', '.join(siblings)}" if siblings else "Remove it"


def _shared_parents(key: str, prefix: str) -> int:
    pairs = zip(key.split("."), prefix.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _shown(value: Any) -> str:
    """A value on one line: text in quotes, mappings and lists only where they are short."""
    text = repr(value)
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    if len(text) <= 60:
        return text
    return "{...}" if isinstance(value, Mapping) else f"{text[:57]}..."


def _kind(value: Any) -> str:
    for kinds, name in (
        (bool, "true or false"),
        (str, "text"),
        (int, "an integer"),
        (float, "a number with a fraction" if isinstance(value, float) and value % 1 else "a number"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
    ):
        if isinstance(value, kinds):
            return name
    return "empty" if value is None else f"of type {type(value).__name__}"
