"""Parameters of a reward as frozen groups, each built from a plain mapping with every problem in it reported.

A field of a group is `param(rule, default)`; a group may have `problems()`, the lines about fields that do not fit
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar, cast

from rlhf.errors import ConfigError, did_you_mean

Rule = Callable[[Any], str | None]
"""What a value must be, when it is not that."""

Group = TypeVar("Group")


def param(rule: Rule, default: Any = MISSING, **how: Any) -> Any:
    """A field of a group; without a default it must be given."""
    metadata = {"rule": rule}
    return field(metadata=metadata, **how) if default is MISSING else field(default=default, metadata=metadata, **how)


def built(group: type[Group], key: str, given: Any) -> Group:
    """The group from plain values. Raises ConfigError with a line for each one that is unknown, missing or wrong."""
    if not isinstance(given, Mapping):
        raise ConfigError([f"{key} = {given!r}: must be an object. It holds the fields of {key}. Indent them"])
    known = {item.name: item for item in fields(cast(Any, group))}
    problems = [
        f"{key}.{name} = {value!r}: there is no such parameter. {did_you_mean(str(name), known)}"
        for name, value in given.items()
        if name not in known
    ]
    for name, item in known.items():
        if name in given:
            problem = item.metadata["rule"](given[name])
            problems += [f"{key}.{name} = {given[name]!r}: {problem}. Correct it."] if problem else []
        elif item.default is MISSING and item.default_factory is MISSING:
            problems.append(f"{key}.{name}: must be given. There is no default for it. Set it.")
    if not problems:
        result = group(**given)
        problems = [f"{key}.{line}" for line in getattr(result, "problems", list)()]
    if problems:
        raise ConfigError(problems)
    return result


# --- rules ------------------------------------------------------------------------------------------------------------


def number(low: float = -math.inf, high: float = math.inf, *, whole: bool = False) -> Rule:
    kind = "a whole number" if whole else "a number"
    bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
    bounds = bounds if math.isfinite(low) else "that is finite"

    def broken(value: Any) -> str | None:
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        return None if right and math.isfinite(value) and low <= value <= high else f"must be {kind} {bounds}"

    return broken


def optional(rule: Rule) -> Rule:
    def broken(value: Any) -> str | None:
        problem = None if value is None else rule(value)
        return f"{problem}, or null" if problem else None

    return broken


def one_of(*allowed: str) -> Rule:
    return lambda value: None if value in allowed else f"must be {' or '.join(allowed)}"


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "must be a text that is not empty"


def texts(value: Any) -> str | None:
    right = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return None if right else "must be a list of texts"
