"""The judge's parameters as frozen groups, each built from a plain mapping with every problem in it reported."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

from rlhf.errors import ConfigError, did_you_mean

Rule = Callable[[Any], str | None]
"""What a value must be, when it is not that."""

Group = TypeVar("Group")

RESERVED_BODY = ("model", "messages", "temperature", "stream", "n", "response_format", "logprobs", "top_logprobs")
RESERVED_DIMENSIONS = ("check", "analysis", "calls", "tokens", "cached", "gated", "confidence")


def _number(low: float, high: float = math.inf, *, whole: bool = False) -> Rule:
    kind = "a whole number" if whole else "a number"

    def broken(value: Any) -> str | None:
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        return None if right and math.isfinite(value) and low <= value <= high else f"must be {kind} {bounds}"

    return broken


def _optional(rule: Rule) -> Rule:
    def broken(value: Any) -> str | None:
        problem = None if value is None else rule(value)
        return f"{problem}, or null" if problem else None

    return broken


def _one_of(*allowed: str) -> Rule:
    return lambda value: None if value in allowed else f"must be {' or '.join(allowed)}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "must be a text that is not empty"


def _texts(value: Any) -> str | None:
    right = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return None if right else "must be a list of texts"


def _base_url(value: Any) -> str | None:
    if not isinstance(value, str) or re.search(r"\s", value):
        return "must be a text without spaces"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        return f"must be a URL ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "must be http://host:port/v1 or https://host/v1"
    if "@" in parts.netloc:
        return "must not hold a user or a password. URLs are logged. Name the variable of the key in api_key_env"
    return "must not have a query or a fragment" if parts.query or parts.fragment else None


def _body(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return "must be an object of request fields"
    taken = [name for name in value if name in RESERVED_BODY]
    return f"must not set {', '.join(taken)}. The judge sets it" if taken else None


def _dimensions(value: Any) -> str | None:
    if not isinstance(value, Mapping) or not value:
        return "must be an object from a dimension's name to {weight, description}"
    for name, spec in value.items():
        if not re.fullmatch("[a-z][a-z0-9_]{0,39}", str(name)) or name in RESERVED_DIMENSIONS:
            return f"must have names like clear_language, none of {', '.join(RESERVED_DIMENSIONS)}: {name!r} is wrong"
        if not isinstance(spec, Mapping) or not set(spec) <= {"weight", "description"}:
            return f"must have {{weight, description}} for {name}"
        if _text(spec.get("description")) or _number(0)(spec.get("weight", 1.0)):
            return f"must have a description and a weight of at least 0 for {name}"
    total = sum(spec.get("weight", 1.0) for spec in value.values())
    return None if total > 0 else "must have a weight above 0"


def _param(rule: Rule, default: Any = MISSING, **how: Any) -> Any:
    metadata = {"rule": rule}
    return field(metadata=metadata, **how) if default is MISSING else field(default=default, metadata=metadata, **how)


def built(group: type[Group], key: str, given: Any) -> Group:
    """The group from plain values. Raises ConfigError with a line for each one that is unknown, missing or wrong."""
    if not isinstance(given, Mapping):
        raise ConfigError([f"{key} = {given!r}: must be an object. It holds the judge's {key}. Indent its fields"])
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


# --- the groups -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointSettings:
    """Where the judge runs and how it is called. Times are in seconds.

    `deadline_s` bounds everything done for one sample (one group, pairwise): keep the component's own deadline_s above
    it. `attempt_s` bounds one request. `structured`: ask for JSON by schema; `auto` turns to labelled lines when the
    server refuses that. `extra_body` adds request fields, null removes one.
    """

    base_url: str = _param(_base_url)
    model: str = _param(_text)
    api_key_env: str | None = _param(_optional(_text), None)
    max_tokens: int = _param(_number(1, whole=True), 512)
    seed: int | None = _param(_optional(_number(0, whole=True)), 0)
    structured: Literal["auto", "always", "never"] = _param(_one_of("auto", "always", "never"), "auto")
    top_logprobs: int = _param(_number(0, 20, whole=True), 0)
    extra_body: Mapping[str, Any] = _param(_body, default_factory=dict)
    concurrency: int = _param(_number(1, whole=True), 16)
    deadline_s: float = _param(_number(0.1), 60.0)
    attempt_s: float = _param(_number(0.1), 30.0)
    retries: int = _param(_number(0, 20, whole=True), 4)
    backoff_s: float = _param(_number(0.0), 0.5)
    breaker_failures: int = _param(_number(1, whole=True), 20)
    breaker_s: float = _param(_number(0.0), 15.0)
    max_reply_bytes: int = _param(_number(1024, whole=True), 1 << 20)

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    @cached_property
    def api_key(self) -> str | None:
        """The value of the variable `api_key_env`. Raises ConfigError, without the value, when it is no key."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        # A client that refuses a header quotes it.
        if not (key and key.isascii() and key.isprintable()):
            rule = "must name an environment variable that holds a key of printable ASCII characters"
            reason = "It is empty or not set" if not key else "Its value has others"
            fix = "Export it where the reward workers start."
            raise ConfigError([f"endpoint.api_key_env = {self.api_key_env!r}: {rule}. {reason}. {fix}"])
        return key

    def problems(self) -> list[str]:
        if self.attempt_s > self.deadline_s:
            rule = "must not be above endpoint.deadline_s"
            return [f"attempt_s = {self.attempt_s:g}: {rule} = {self.deadline_s:g}. It never applies. Lower it."]
        return []


@dataclass(frozen=True)
class RubricSettings:
    """What is graded: `dimensions` from name to {weight: 1.0, description}, each an integer in [low, high]."""

    dimensions: Mapping[str, Mapping[str, Any]] = _param(_dimensions)
    low: int = _param(_number(-100, 100, whole=True), 1)
    high: int = _param(_number(-100, 100, whole=True), 5)

    def problems(self) -> list[str]:
        if self.low < self.high:
            return []
        return [f"high = {self.high}: must be above rubric.low = {self.low}. There is one grade only. Raise it."]

    def value(self, grades: Mapping[str, Any]) -> float:
        """The weighted mean of the grades, with `low` as 0 and `high` as 1."""
        weights = {name: float(spec.get("weight", 1.0)) for name, spec in self.dimensions.items()}
        total = sum(weight * (grades[name] - self.low) / (self.high - self.low) for name, weight in weights.items())
        return min(1.0, max(0.0, total / sum(weights.values())))


@dataclass(frozen=True)
class CanarySettings:
    """Every 1/`rate` calls a known-wrong answer is sent too. Alarm: over `max_false_positives` of the last `window`.

    One false positive alone raises no alarm. `positive_at` is the value from which a canary passes for right.
    """

    rate: float = _param(_number(0.0, 1.0), 0.05)
    max_false_positives: float = _param(_number(0.0, 1.0), 0.01)
    window: int = _param(_number(10, whole=True), 1000)
    positive_at: float = _param(_number(0.0, 1.0), 0.5)


@dataclass(frozen=True)
class CacheSettings:
    """`entries` verdicts are kept in memory; `path` is a JSON Lines file that keeps them beyond the process."""

    entries: int = _param(_number(0, whole=True), 10_000)
    path: str | None = _param(_optional(_text), None)


@dataclass(frozen=True)
class BudgetSettings:
    """What one grader process may spend. Calls in flight are finished, so it may be passed by as many."""

    max_calls: int | None = _param(_optional(_number(0, whole=True)), None)
    max_tokens: int | None = _param(_optional(_number(0, whole=True)), None)


@dataclass(frozen=True)
class PromptSettings:
    """What is sent. Templates left out are those of `rewards.judge.prompts`.

    `answer_from` is where the final answer is, for judging against a reference: `boxed`; `marked` takes what follows
    "the answer is" too; `last_line` else takes the last line. A longer candidate than `max_candidate_chars` is gated.
    `explain` has the judge write an analysis before its verdict. `master_keys` adds to the built-in ones.
    """

    system: str | None = _param(_optional(_text), None)
    template: str | None = _param(_optional(_text), None)
    explain: bool = _param(_flag, False)
    answer_from: Literal["boxed", "marked", "last_line"] = _param(_one_of("boxed", "marked", "last_line"), "last_line")
    max_candidate_chars: int = _param(_number(1, whole=True), 20_000)
    master_keys: tuple[str, ...] = _param(_texts, ())
