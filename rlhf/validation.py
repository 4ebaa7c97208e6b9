"""The second gate of a run config: what Hydra composed is checked in full before any process starts.

Every problem is reported at once, as `dotted.key = value: rule. reason. fix.` Rules within a field come from the schema
in `rlhf.config`, rules across sections from `rlhf.rules`.
"""

from __future__ import annotations

import re
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
from rlhf.config import AlgorithmConfig, PreferenceStage, RlStage, RunConfig, StageConfig
from rlhf.errors import ConfigError, did_you_mean
from rlhf.rules import problem
from rlhf.schema import Schema, keys_of

ELSEWHERE = {
    "epochs": "steps",
    "lr": "learning_rate",
    "max_new_tokens": "max_completion_tokens",
    "max_tokens": "max_completion_tokens",
    "n": "group_size",
    "num_generations": "group_size",
    "num_gpus": "ranks",
    "steps": "epochs",
    "top_n": "top_k",
    "world_size": "ranks",
}
"""What other trainers call a key -> what it is called here."""

_OWN_KEY = re.compile(r"(?<![\w.])algorithm\.(name|modules)\b")
_RULE_OF_A_FIELD = re.compile(r"([a-z_]+(?:\.[a-z_]+)*) (must .+)", re.DOTALL)
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
    algorithms_of, problems = _build_all(known.pop("algorithm", None), sections.get("stages") or {})
    known["algorithms"] = algorithms_of
    return problems + rules.check(known)


def _build_all(default: AlgorithmConfig | None, stages: Mapping[str, Any]) -> tuple[dict[str, rules.Chosen], list[str]]:
    """The algorithm of each stage that has or shares one, where it can be built, and the problems of all."""
    built: dict[str, rules.Chosen] = {}
    shared, problems = _build(default, "algorithm") if default is not None else (None, [])
    for name, stage in stages.items():
        if not isinstance(stage, RlStage | PreferenceStage):
            continue
        if stage.algorithm is None:
            chosen = shared
        else:
            chosen, own = _build(stage.algorithm, f"stages.{name}.algorithm")
            problems += own
        if chosen is not None:
            built[name] = chosen
    return built, problems


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


def _build(chosen: AlgorithmConfig, key: str) -> tuple[rules.Chosen | None, list[str]]:
    """The algorithm that the config at `key` chooses, or what is wrong with it."""
    try:
        return rules.Chosen(key, chosen.name, algorithms.build(*_arguments(chosen))), []
    except ConfigError as error:
        # The registry does not know that a stage chose; a traceback in the message may name other things like it.
        return None, [_OWN_KEY.sub(rf"{key}.\1", message) for message in error.problems]
    except ValidationError as error:
        schema = _algorithm_schema(chosen.name)
        prefix = tuple(key.split("."))
        keys = [*(f"{key}.{name}" for name in schema.properties), *keys_of(Schema.of(RunConfig), {})]
        return None, [_message(item, schema, keys, prefix) for item in error.errors(include_url=False)]


def _arguments(chosen: AlgorithmConfig) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    return chosen.name, chosen.hyperparameters, chosen.modules


def _algorithm_schema(name: str) -> Schema:
    """The algorithm's own fields; nothing known of one that is not registered."""
    return Schema.of(algorithms.algorithm(name)) if name in algorithms.names() else Schema({}, {})


# --- pydantic's errors in the form of ours ----------------------------------------------------------------------------


def _field_problems(error: ValidationError, raw: Any) -> Iterator[str]:
    schema = Schema.of(RunConfig)
    keys = list(keys_of(schema, raw))
    chosen = raw.get("algorithm") if isinstance(raw, Mapping) else None
    if isinstance(chosen, Mapping):
        keys += [f"algorithm.{key}" for key in _algorithm_schema(str(chosen.get("name"))).properties]
    for item in _told_once(error, schema):
        yield _message(item, schema, keys)


def _told_once(error: ValidationError, schema: Schema) -> Iterator[dict[str, Any]]:
    """The errors, without those of a member of a union that the value was not meant for.

    pydantic tries every member of `text or a mapping` and reports what each has against the value.
    """
    seen = set()
    for item in error.errors(include_url=False):
        *place, last = item["loc"] or ("",)
        node = schema.locate(place)[1]
        if last not in node.members:
            yield {**item}
        elif not isinstance(item["input"], Mapping) and tuple(place) not in seen:
            seen.add(tuple(place))
            yield {**item, "loc": tuple(place)}


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
        tags = node.section.tags
        given = item["ctx"].get("tag", "(missing)")
        reason = "It decides which other keys there are"
        fix = did_you_mean(str(given), tags, "Choose one of them")
        return problem(f"{key}.kind", given, f"must be one of {', '.join(tags)}", reason, fix)
    if kind == "value_error":
        return _of_a_validator(key, value, str(item["ctx"]["error"]), node)
    rule = f"must be {node.description}"
    if kind == "missing":
        return problem(key, "(missing)", rule, "It has no default", f"Add {key}")
    return problem(key, _shown(value), rule, *_reason_and_fix(item, node))


def _of_a_validator(key: str, value: Any, text: str, node: Schema) -> str:
    """A message of our own validators, which say rule, reason and fix themselves: `kl.placement must not be ...`.

    They are of a whole section; the key and the value are those of the field that the text begins with.
    """
    named = _RULE_OF_A_FIELD.fullmatch(text)
    if named is None:
        return f"{key} = {_shown(value)}: {text}."
    field, rest = named.groups()
    for name in field.split("."):
        given = value if isinstance(value, Mapping) else {}
        value, node = given.get(name, node.properties.get(name, {}).get("default")), node.child(name)
    return f"{key}.{field} = {_shown(value)}: {rest}."


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
    plain = {
        "finite_number": ("It is not finite", default),
        "string_pattern_mismatch": ("This text does not match", "Rename it"),
        "too_short": ("There are too few entries", "Add one"),
    }
    return plain.get(kind, (item["msg"].rstrip("."), default))


def _other_key(path: tuple[str, ...], siblings: Sequence[str], keys: Sequence[str]) -> str:
    """The nearest valid key: of this name at this level or another one, else of a similar name here or elsewhere."""
    own, *parents = reversed(path)
    prefix, name = ".".join(reversed(parents)), ELSEWHERE.get(own, own)
    names = (own, name)
    here = {f"{prefix}.{sibling}".lstrip("."): sibling for sibling in siblings}
    last = {key: key.rpartition(".")[2] for key in keys}
    found = ([key for key, leaf in places.items() if leaf == name] for places in (here, last) for name in names)
    same = next(filter(None, found), [])
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
