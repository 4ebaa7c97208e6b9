"""What a reward author writes against: `@reward` on a function of a `RewardInput`.

    @reward("even", low=0.0, high=1.0)
    def even(sample: RewardInput, base: int = 10) -> float | bool | Abstain | Score:
        return int(sample.final, base) % 2 == 0

    @reward("shortest", group=True)
    def shortest(samples: Sequence[RewardInput]) -> list[float | bool | Abstain | Score]:
        least = min(sample.completion_tokens for sample in samples)
        return [sample.completion_tokens == least for sample in samples]

An `async def` runs beside many others on one event loop, so a reward that mostly waits needs one process. Keyword
arguments come from `rewards.components.<name>.params`. What the function raises, and a value that is not a finite
number in the declared range, is a failed reward with the author's traceback, never a zero. Nothing here imports torch,
ray or numpy: reward functions run in small killable processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from numbers import Real
from pathlib import Path
from typing import Any, Literal, overload

from rlhf.errors import ConfigError, GroupwiseError, did_you_mean
from rlhf.thinking import THINK_CLOSE, THINK_OPEN

BUILTIN_MODULES = (
    "rewards.chart",
    "rewards.code",
    "rewards.conciseness",
    "rewards.counting",
    "rewards.format",
    "rewards.grounding",
    "rewards.instruction",
    "rewards.judge",
    "rewards.language",
    "rewards.math",
    "rewards.multiple_choice",
    "rewards.ocr",
    "rewards.overlong",
    "rewards.preference",
    "rewards.reasoning_gym",
    "rewards.repetition",
    "rewards.science",
)


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
    """A reward function returned something that is not a reward, or a server says that it failed there, and how."""

    def __init__(
        self, message: str, kind: Literal["invalid", "raised", "transient"] = "invalid", trace: str = ""
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.trace = trace


class TransientRewardError(GroupwiseError):
    """For authors to raise where another attempt may succeed: a rate limit, a dropped connection.

    The next attempt, if there is one, is made `wait_s` later at the earliest.
    """

    def __init__(self, message: str = "", wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def printable(text: object, length: int) -> str:
    """The first `length` characters of what a model said as one line, fit for logs, terminals and tables.

    Control and direction characters, and what UTF-8 lacks, are replaced.
    """
    shown = " ".join(str(text)[:length].split("\n"))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


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
    """A registered reward: the author's function, its declared range and where it was defined.

    `group`: it takes all samples of a group at once and returns as many values. `packages` must be installed. `retry`
    are exceptions after which another attempt may succeed, besides TransientRewardError.
    """

    name: str
    function: Callable[..., Any]
    low: float
    high: float
    location: str
    group: bool = False
    packages: tuple[str, ...] = ()
    retry: tuple[type[Exception], ...] = ()

    def judge(self, sample: RewardInput, params: Mapping[str, Any]) -> Score | Abstain:
        """The function's verdict on `sample`, checked; a group reward sees a group of this one.

        Raises what the function raises, or InvalidRewardError. Not for use under a running event loop.
        """
        if not self.group:
            return self.checked(self._finished(self.function(sample, **params)))
        verdict = self.judge_group([sample], params)[0]
        if isinstance(verdict, InvalidRewardError):
            raise verdict
        return verdict

    def judge_group(
        self, samples: Sequence[RewardInput], params: Mapping[str, Any]
    ) -> list[Score | Abstain | InvalidRewardError]:
        """A group reward's verdict on each of `samples`. Raises as `judge`, also when their number is wrong."""
        return self.checked_group(self._finished(self.function(samples, **params)), len(samples))

    def checked(self, returned: Any) -> Score | Abstain:
        """What the function returned for one sample, as a verdict. Raises InvalidRewardError."""
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

    def checked_group(self, returned: Any, count: int) -> list[Score | Abstain | InvalidRewardError]:
        """What the function returned for `count` samples, as verdicts. A wrong number of them is wrong for all."""
        if not isinstance(returned, Sequence) or isinstance(returned, str | bytes):
            raise InvalidRewardError(
                f"group reward {self.name!r} returned {type(returned).__name__}: must be a list with one value for "
                f"each of the {count} samples. Defined at {self.location}"
            )
        if len(returned) != count:
            raise InvalidRewardError(
                f"group reward {self.name!r} returned {len(returned)} values for {count} samples: must be one for "
                f"each, in their order; Abstain(reason) where it does not apply. Defined at {self.location}"
            )
        return [self._checked_or_error(value) for value in returned]

    def _checked_or_error(self, returned: Any) -> Score | Abstain | InvalidRewardError:
        if isinstance(returned, InvalidRewardError):
            return returned
        try:
            return self.checked(returned)
        except InvalidRewardError as error:
            return error

    @staticmethod
    def _finished(returned: Any) -> Any:
        return asyncio.run(_awaited(returned)) if inspect.isawaitable(returned) else returned

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def is_transient(self, error: BaseException) -> bool:
        """The author declared that another attempt may end differently."""
        return isinstance(error, (TransientRewardError, *self.retry))

    @property
    def missing_packages(self) -> tuple[str, ...]:
        """Those of `packages` that are not installed, under the name of a distribution or of a module."""
        return tuple(package for package in self.packages if not _installed(package))

    @property
    def version(self) -> str:
        """Changes with the source that defines the function: its file, or all of its package where it is in one."""
        path = inspect.getsourcefile(inspect.unwrap(self.function))
        if not path or not Path(path).is_file():
            return hashlib.sha256(self.location.encode()).hexdigest()[:16]
        return _source_digest(Path(path))

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


@cache
def _source_digest(file: Path) -> str:
    """Of `file`, or of every module below the outermost folder round it that is a package."""
    packages = list(takewhile(lambda folder: (folder / "__init__.py").is_file(), file.parents))
    digest = hashlib.sha256()
    for source in sorted(packages[-1].rglob("*.py")) if packages else [file]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


# --- the registry -----------------------------------------------------------------------------------------------------

_REGISTERED: dict[str, RewardFunction] = {}


@overload
def reward(name: Callable[..., Any], /) -> Callable[..., Any]: ...


@overload
def reward(
    name: str | None = None,
    /,
    *,
    low: float = 0.0,
    high: float = 1.0,
    group: bool = False,
    requires: Iterable[str] = (),
    retry: Iterable[type[Exception]] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...


def reward(
    name: str | Callable[..., Any] | None = None,
    /,
    *,
    low: float = 0.0,
    high: float = 1.0,
    group: bool = False,
    requires: Iterable[str] = (),
    retry: Iterable[type[Exception]] = (),
) -> Any:
    """Register a function under `name` (its own when left out) and return it unchanged.

    `low` and `high` bound every value. `group`: it takes a sequence of RewardInput and returns as many values.
    `requires` names packages to install; import them inside the function. `retry` are exceptions, besides
    TransientRewardError, after which it is called again. Raises ConfigError when the name is taken, naming both places,
    or when the range is empty.
    """

    def registered(function: Callable[..., Any]) -> Callable[..., Any]:
        own = name if isinstance(name, str) else function.__name__
        where = location_of(function)
        entry = RewardFunction(own, function, float(low), float(high), where, group, tuple(requires), tuple(retry))
        register(entry)
        return function

    return registered(name) if callable(name) else registered


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


def register(entry: RewardFunction, *, replacing: bool = False) -> None:
    """Make `entry` known. Raises ConfigError when its range is empty, or its name is taken unless it is `replacing`."""
    if not entry.low < entry.high:
        raise ConfigError(
            [f"reward {entry.name!r}: low={entry.low} must be below high={entry.high}. Defined at {entry.location}"]
        )
    if entry.name in _REGISTERED and not replacing:
        raise ConfigError(
            [f"reward = {entry.name!r}: a name can be registered once. It is defined at "
             f"{_REGISTERED[entry.name].location} and at {entry.location}. Rename one of them."]
        )  # fmt: skip
    _REGISTERED[entry.name] = entry


def registered_as(function: Callable[..., Any]) -> RewardFunction | None:
    """The entry that `@reward` made for this very function."""
    return next((entry for entry in _REGISTERED.values() if entry.function is function), None)


def location_of(function: Callable[..., Any]) -> str:
    """`file:line` of a function, or the name of what is no plain function."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _installed(package: str) -> bool:
    from importlib import metadata  # 20 ms that a grader process saves at its start

    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return package.isidentifier() and importlib.util.find_spec(package) is not None
    return True


async def _awaited(returned: Any) -> Any:
    return await returned
