"""What a reward author writes against: `@reward` on a function of a `RewardInput`.

    @reward("even", low=0.0, high=1.0)
    def even(sample: RewardInput, base: int = 10) -> float | bool | Abstain | Score:
        return int(sample.final, base) % 2 == 0

Keyword arguments come from `rewards.components.<name>.params`. What the function raises, and a value that is not a
finite number in the declared range, is a failed reward with the author's traceback, never a zero. Nothing here
imports torch, ray or numpy: reward functions run in small killable processes.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, overload

from rlhf.errors import ConfigError, GroupwiseError, did_you_mean

BUILTIN_MODULES = ("rewards.conciseness", "rewards.format", "rewards.language", "rewards.math")

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


# --- what a reward sees and returns -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RewardInput:
    """One completion and what is needed to judge it.

    `completion` is the full text. `reasoning` is the text before the last `</think>` ("" without one), `final` the
    text after it; without a `</think>` `final` is everything, or "" where the thinking was opened and never closed.
    `reasoning_mode`: the chat template opened `<think>`. `truncated`: the token limit cut the completion.
    """

    messages: tuple[Mapping[str, str], ...]
    completion: str
    reasoning: str
    final: str
    answer: str
    metadata: Mapping[str, Any]
    truncated: bool
    completion_tokens: int
    reasoning_mode: bool

    @classmethod
    def of(
        cls,
        completion: str,
        answer: str = "",
        *,
        messages: Iterable[Mapping[str, str]] = (),
        metadata: Mapping[str, Any] | None = None,
        truncated: bool = False,
        completion_tokens: int = 0,
        reasoning_mode: bool = False,
    ) -> RewardInput:
        """The input for a completion, with `reasoning` and `final` split out of it."""
        reasoning, final = split_thinking(completion, reasoning_mode)
        return cls(
            messages=tuple(messages),
            completion=completion,
            reasoning=reasoning,
            final=final,
            answer=answer,
            metadata=metadata or {},
            truncated=truncated,
            completion_tokens=completion_tokens,
            reasoning_mode=reasoning_mode,
        )


@dataclass(frozen=True, slots=True)
class Abstain:
    """The reward does not apply to this sample, which is then masked and counted, not scored 0."""

    reason: str


@dataclass(frozen=True, slots=True)
class Score:
    """A value with a short note for the sample table and named sub-values for the metrics."""

    value: float
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


class InvalidRewardError(GroupwiseError):
    """A reward function returned something that is not a reward."""


def split_thinking(completion: str, reasoning_mode: bool) -> tuple[str, str]:
    """(reasoning, final) as `RewardInput` defines them, both stripped of surrounding white space."""
    reasoning, closed, final = completion.rpartition(THINK_CLOSE)
    if closed:
        return reasoning.strip().removeprefix(THINK_OPEN).strip(), final.strip()
    opened = reasoning_mode or completion.lstrip().startswith(THINK_OPEN)
    return "", "" if opened else completion.strip()


# --- the registered function ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A registered reward: the author's function, its declared range and where it was defined."""

    name: str
    function: Callable[..., Any]
    low: float
    high: float
    location: str

    def judge(self, sample: RewardInput, params: Mapping[str, Any]) -> Score | Abstain:
        """The function's verdict on `sample`, checked. Raises what the function raises, or InvalidRewardError."""
        returned = self.function(sample, **params)
        if isinstance(returned, Abstain):
            return returned
        verdict = returned if isinstance(returned, Score) else Score(returned)
        value = self._number(verdict.value, "returned")
        if not self.low <= value <= self.high:
            raise InvalidRewardError(
                f"reward {self.name!r} returned {value:g}: must lie in [{self.low:g}, {self.high:g}]. "
                f"Declare its range with @reward({self.name!r}, low=..., high=...). Defined at {self.location}"
            )
        parts = {str(key): self._number(part, f"part {key!r} is") for key, part in verdict.parts.items()}
        return Score(value, str(verdict.reason), parts)

    def _number(self, value: Any, what: str) -> float:
        if not isinstance(value, Real):
            hint = " Return Abstain(reason) where the reward does not apply." if value is None else ""
            raise InvalidRewardError(
                f"reward {self.name!r} {what} {type(value).__name__}: must be float, bool, Abstain or Score.{hint} "
                f"Defined at {self.location}"
            )
        if not math.isfinite(value):
            raise InvalidRewardError(f"reward {self.name!r} {what} {value}: must be finite. Defined at {self.location}")
        return float(value)

    @property
    def accepts(self) -> tuple[str, ...] | None:
        """Names of the parameters it takes besides the sample; None when it takes any (`**params`)."""
        parameters = self._parameters()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        return tuple(p.name for p in parameters)

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the parameters without a default."""
        return tuple(p.name for p in self._parameters() if p.default is p.empty and p.kind is not p.VAR_KEYWORD)

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())[1:]


# --- the registry -----------------------------------------------------------------------------------------------------

_REGISTERED: dict[str, RewardFunction] = {}


@overload
def reward(name: Callable[..., Any], /) -> Callable[..., Any]: ...


@overload
def reward(
    name: str | None = None, /, *, low: float = 0.0, high: float = 1.0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...


def reward(name: str | Callable[..., Any] | None = None, /, *, low: float = 0.0, high: float = 1.0) -> Any:
    """Register a function under `name` (its own when left out) and return it unchanged.

    Raises ConfigError when the name is taken, naming both places, or when the range is empty.
    """
    if callable(name):
        return _register(name.__name__, name, low, high)
    return lambda function: _register(name or function.__name__, function, low, high)


def lookup(name: str) -> RewardFunction:
    """The reward registered as `name`. Raises ConfigError with the nearest name and all names."""
    known = names()
    if name not in known:
        raise ConfigError([unknown_name("reward", name, known)])
    return _REGISTERED[name]


def names() -> tuple[str, ...]:
    """Every registered name, sorted; the built-in rewards are always among them."""
    for module in BUILTIN_MODULES:
        importlib.import_module(module)
    return tuple(sorted(_REGISTERED))


def unknown_name(key: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among `known`, with the nearest one."""
    known = sorted(known)
    listed = ", ".join(known) or "(none)"
    return f"{key} = {name!r}: must be one of {listed}. There is no such name. {did_you_mean(name, known, '')}".rstrip()


def _register(name: str, function: Callable[..., Any], low: float, high: float) -> Callable[..., Any]:
    location = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
    if not low < high:
        raise ConfigError([f"reward {name!r}: low={low} must be below high={high}. Defined at {location}"])
    if name in _REGISTERED:
        raise ConfigError(
            [f"reward = {name!r}: a name can be registered once. It is defined at {_REGISTERED[name].location} and at "
             f"{location}. Rename one of them."]
        )  # fmt: skip
    _REGISTERED[name] = RewardFunction(name, function, float(low), float(high), location)
    return function
