"""The judge's parameters as frozen groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rewards.http_endpoint import ConnectionSettings
from rewards.parameter_groups import flag, number, one_of, optional, param, text, texts

RESERVED_BODY = ("model", "messages", "temperature", "stream", "n", "response_format", "logprobs", "top_logprobs")
RESERVED_DIMENSIONS = ("check", "analysis", "calls", "tokens", "cached", "gated", "confidence")


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
        if text(spec.get("description")) or number(0)(spec.get("weight", 1.0)):
            return f"must have a description and a weight of at least 0 for {name}"
    total = sum(spec.get("weight", 1.0) for spec in value.values())
    return None if total > 0 else "must have a weight above 0"


# --- the groups -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointSettings(ConnectionSettings):
    """Where the judge runs and how it is asked: `deadline_s` bounds everything for one sample (one group, pairwise).

    `structured`: ask for JSON by schema; `auto` turns to labelled lines when the server refuses that. `extra_body` adds
    request fields, null removes one.
    """

    max_tokens: int = param(number(1, whole=True), 512)
    seed: int | None = param(optional(number(0, whole=True)), 0)
    structured: Literal["auto", "always", "never"] = param(one_of("auto", "always", "never"), "auto")
    top_logprobs: int = param(number(0, 20, whole=True), 0)
    extra_body: Mapping[str, Any] = param(_body, default_factory=dict)

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"


@dataclass(frozen=True)
class RubricSettings:
    """What is graded: `dimensions` from name to {weight: 1.0, description}, each an integer in [low, high]."""

    dimensions: Mapping[str, Mapping[str, Any]] = param(_dimensions)
    low: int = param(number(-100, 100, whole=True), 1)
    high: int = param(number(-100, 100, whole=True), 5)

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

    rate: float = param(number(0.0, 1.0), 0.05)
    max_false_positives: float = param(number(0.0, 1.0), 0.01)
    window: int = param(number(10, whole=True), 1000)
    positive_at: float = param(number(0.0, 1.0), 0.5)


@dataclass(frozen=True)
class CacheSettings:
    """`entries` verdicts are kept in memory; `path` is a JSON Lines file that keeps them beyond the process."""

    entries: int = param(number(0, whole=True), 10_000)
    path: str | None = param(optional(text), None)


@dataclass(frozen=True)
class PromptSettings:
    """What is sent. Templates left out are those of `rewards.judge.prompts`.

    `answer_from` is where the final answer is, for judging against a reference: `boxed`; `marked` takes what follows
    "the answer is" too; `last_line` else takes the last line. A longer candidate than `max_candidate_chars` is gated.
    `explain` has the judge write an analysis before its verdict. `master_keys` adds to the built-in ones.
    """

    system: str | None = param(optional(text), None)
    template: str | None = param(optional(text), None)
    explain: bool = param(flag, False)
    answer_from: Literal["boxed", "marked", "last_line"] = param(one_of("boxed", "marked", "last_line"), "last_line")
    max_candidate_chars: int = param(number(1, whole=True), 20_000)
    master_keys: tuple[str, ...] = param(texts, ())
