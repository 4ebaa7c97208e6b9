"""Rewards written for other trainers, run unchanged: `rewards.components.<name>.path` (or `url`) and `style`.

    groupwise   f(sample: RewardInput), with or without @reward
    trl         f(prompts, completions, **columns) -> list[float | None]; sync or async; None is an abstention
    verl        compute_score(data_source, solution_str, ground_truth, extra_info) -> float | {"score": ..., ...}
    openrlhf    reward_func(queries, prompts, labels) -> tensor | list | {"rewards", "scores", "extra_logs"}
    openrlhf by url: POST {"query", "prompts", "labels"} -> {"rewards": [...]}
    groupwise by url: `python -m rewards serve`; values, abstentions and errors of each sample stay what they are there

What they are given: the columns of TRL are `answer` and every key of the record's metadata; a conversational prompt is
its messages, else their contents joined by blank lines, which is also what OpenRLHF's `prompts` hold. OpenRLHF's
`queries` are prompt + completion. verl's `data_source` is that key of the metadata, else the component's name;
`extra_info` is that key where it is a mapping, else all of the metadata. `params` are further keyword arguments. Their
values are bounded by the component's `low` and `high` and must be finite; further numbers they return become parts.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import inf
from numbers import Real
from typing import Any, Literal
from urllib.parse import urlsplit

from rewards import registry
from rewards.http_endpoint import retry_after_s
from rewards.registry import Abstain, InvalidRewardError, RewardFunction, RewardInput, Score, TransientRewardError
from rlhf.errors import ConfigError, did_you_mean
from rlhf.plugins import load_module

Samples = Sequence[RewardInput]
Arguments = tuple[Sequence[Any], Mapping[str, Any]]

HTTP_TIMEOUT_S = 180.0  # the component's deadline ends the wait earlier; this ends the thread
HTTP_THREADS = 64
RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
NOT_GIVEN = ("completion_ids", "completions_ids", "trainer_state", "log_extra", "log_metric")
_NO_COLUMNS = ("prompt", "prompts", "completion", "completions", *NOT_GIVEN)


@dataclass(frozen=True, slots=True)
class Foreign:
    """A component that names a function or a server of its own; `low` and `high` None leave the style's default."""

    name: str
    style: Literal["groupwise", "trl", "verl", "openrlhf"]
    path: str | None = None
    url: str | None = None
    low: float | None = None
    high: float | None = None
    conversational: bool = True

    @property
    def key(self) -> str:
        return f"rewards.components.{self.name}"


def register(foreign: Foreign) -> None:
    """Register the function or server under the component's name. Raises ConfigError when there is no such function."""
    if foreign.url is not None:
        _register_remote(foreign, foreign.url)
        return
    function = _function(foreign)
    if foreign.style == "groupwise":
        _register_own(foreign, function)
    else:
        adapted = _ADAPTERS[foreign.style](foreign, function)
        _register(foreign, adapted, registry.location_of(function), group=foreign.style != "verl")


def _register(foreign: Foreign, function: Callable[..., Any], location: str, group: bool = True) -> None:
    low = -inf if foreign.low is None else foreign.low
    high = inf if foreign.high is None else foreign.high
    registry.register(RewardFunction(foreign.name, function, low, high, location, group))


def _register_remote(foreign: Foreign, url: str) -> None:
    """A server of our own protocol may stand in for the reward of its name, whose range then holds."""
    if foreign.style == "openrlhf":
        _register(foreign, remote(url), f"url {url}")
        return
    here = registry.lookup(foreign.name) if foreign.name in registry.names() else None
    low, high = (here.low, here.high) if here else (-inf, inf)
    low, high = low if foreign.low is None else foreign.low, high if foreign.high is None else foreign.high
    function = remote_service(endpoint(url, foreign.name))
    registry.register(RewardFunction(foreign.name, function, low, high, f"url {url}", group=True), replacing=True)


def _register_own(foreign: Foreign, function: Callable[..., Any]) -> None:
    entry = registry.registered_as(function)
    if entry is None:
        low, high = 0.0 if foreign.low is None else foreign.low, 1.0 if foreign.high is None else foreign.high
        registry.register(RewardFunction(foreign.name, function, low, high, registry.location_of(function)))
        return
    if foreign.low is not None or foreign.high is not None:
        rule = "must not be set for a function with @reward. It declares its range there. Remove low and high"
        raise ConfigError([f"{foreign.key}.low = {foreign.low}: {rule}."])
    if entry.name != foreign.name:
        registry.register(replace(entry, name=foreign.name))


def _function(foreign: Foreign) -> Callable[..., Any]:
    path, _, name = (foreign.path or "").rpartition(":")
    module = load_module(f"{foreign.key}.path", path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        rule = f"must name a function. There is no function {name} in {path}"
        raise ConfigError([f"{foreign.key}.path = {foreign.path}: {rule}. {did_you_mean(name, known)}"])
    return function


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl(foreign: Foreign, function: Callable[..., Any]) -> Callable[..., Any]:
    """A group reward from `f(prompts, completions, **columns)`. Raises ConfigError when it needs what is not there."""
    parameters = _parameters(function)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    if refused := [name for name in needed if name in NOT_GIVEN]:
        rule = f"must not need {', '.join(refused)}. A reward here sees text and the record, not the trainer"
        raise ConfigError([f"{foreign.key}.path = {foreign.path}: {rule}. Give the parameter a default."])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}

    def arguments(samples: Samples, params: Mapping[str, Any]) -> Arguments:
        columns = _trl_columns(samples, foreign.conversational) | dict(params)
        if missing := [name for name in needed if name not in columns]:
            has = ", ".join(sorted(columns.keys() - {"prompts", "completions"}))
            raise InvalidRewardError(
                f"reward {foreign.name!r} needs the column {missing[0]!r}: the record has {has}. Name the column in "
                f"data.*.columns.metadata. Defined at {registry.location_of(function)}"
            )
        return (), {key: value for key, value in columns.items() if takes_any or key in names}

    return _adapted(function, arguments, _listed, any_params=True)


def _trl_columns(samples: Samples, conversational: bool) -> dict[str, Any]:
    keys = [key for key in samples[0].metadata if key not in _NO_COLUMNS]
    columns: dict[str, Any] = {key: [sample.metadata.get(key) for sample in samples] for key in keys}
    columns["answer"] = [sample.answer for sample in samples]
    if conversational:
        columns["prompts"] = [[dict(message) for message in sample.messages] for sample in samples]
        columns["completions"] = [[{"role": "assistant", "content": sample.completion}] for sample in samples]
    else:
        columns["prompts"] = [_text(sample) for sample in samples]
        columns["completions"] = [sample.completion for sample in samples]
    return columns


# --- verl -------------------------------------------------------------------------------------------------------------


def verl(foreign: Foreign, function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward from `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

    def arguments(sample: RewardInput, params: Mapping[str, Any]) -> Arguments:
        extra = sample.metadata.get("extra_info")
        given = {
            "data_source": sample.metadata.get("data_source", foreign.name),
            "solution_str": sample.completion,
            "ground_truth": sample.answer,
            "extra_info": dict(extra if isinstance(extra, Mapping) else sample.metadata),
        }
        return (), given | dict(params)

    def verdict(returned: Any) -> Any:
        result = _plain(returned)
        if not isinstance(result, Mapping):
            return result
        if "score" not in result:
            has = ", ".join(map(str, result)) or "nothing"
            raise InvalidRewardError(f"reward {foreign.name!r} returned a dict without 'score': it has {has}.")
        numbers = {key: float(value) for key, value in result.items() if isinstance(value, Real) and key != "score"}
        return Score(result["score"], parts=numbers)

    return _adapted(function, arguments, verdict, ("data_source", "solution_str", "ground_truth", "extra_info"))


# --- OpenRLHF ---------------------------------------------------------------------------------------------------------


def openrlhf(_: Foreign, function: Callable[..., Any]) -> Callable[..., Any]:
    """A group reward from `reward_func(queries, prompts, labels)`."""

    def arguments(samples: Samples, params: Mapping[str, Any]) -> Arguments:
        return tuple(_openrlhf_fields(samples).values()), params

    return _adapted(function, arguments, _openrlhf_verdicts, [p.name for p in _parameters(function)[:3]])


def remote(url: str) -> Callable[..., Any]:
    """A group reward from a server that speaks OpenRLHF's protocol; a null in its answer is an abstention."""
    threads = ThreadPoolExecutor(HTTP_THREADS, thread_name_prefix="http")

    async def remote_reward(samples: Samples) -> Any:
        query, prompts, labels = _openrlhf_fields(samples).values()
        body = json.dumps({"query": query, "prompts": prompts, "labels": labels}).encode()
        answer = await asyncio.get_running_loop().run_in_executor(threads, _post, url, body)
        return _openrlhf_verdicts(answer)

    return remote_reward


def endpoint(url: str, name: str) -> str:
    """Where the reward `name` of a server is asked; a `url` with a path of its own is taken as it is."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/score/{name}"


def remote_service(url: str) -> Callable[..., Any]:
    """A group reward from `python -m rewards serve`: each row's value, abstention or error as it was there."""
    threads = ThreadPoolExecutor(HTTP_THREADS, thread_name_prefix="http")

    async def remote_reward(samples: Samples) -> Any:
        body = json.dumps({"rows": [_row(sample) for sample in samples]}, default=_json_default).encode()
        answer = await asyncio.get_running_loop().run_in_executor(threads, _post, url, body)
        results = answer.get("results") if isinstance(answer, Mapping) else None
        if not isinstance(results, list):
            raise InvalidRewardError(f"{url} does not speak this protocol: its answer has no list 'results'.")
        return [_row_verdict(url, result) for result in results]

    return remote_reward


def _row(sample: RewardInput) -> dict[str, Any]:
    return {
        "prompt": [dict(message) for message in sample.messages],
        "completion": sample.completion,
        "answer": sample.answer,
        "metadata": dict(sample.metadata),
        "truncated": sample.truncated,
        "completion_tokens": sample.completion_tokens,
        "reasoning_mode": sample.reasoning_mode,
    }


def _row_verdict(url: str, result: Any) -> Score | Abstain | InvalidRewardError:
    match result:
        case {"status": "value", "value": value, "reason": str(reason), "parts": dict(parts)}:
            return Score(value, reason, parts)
        case {"status": "abstain", "reason": str(reason)}:
            return Abstain(reason)
        case {"status": "error", "reason": str(reason), "error": {"kind": str(kind), "traceback": str(trace)}}:
            # What cost the server a process may go well there another time; here no process was lost.
            lasting = kind in ("invalid", "raised")
            return InvalidRewardError(f"at {url}: {reason}", kind if lasting else "transient", trace)  # type: ignore[arg-type]
    return InvalidRewardError(f"{url} does not speak this protocol: a result is {str(result)[:200]!r}.")


def _json_default(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise InvalidRewardError(f"metadata of type {type(value).__name__} cannot be sent to a server: must be JSON.")


def _post(url: str, body: bytes) -> Any:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        message = f"{url} answered {error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
        if error.code not in RETRIED_STATUS:
            raise InvalidRewardError(message) from error
        wait_s = retry_after_s(error.headers.get("Retry-After", ""), time.time())
        raise TransientRewardError(message, wait_s) from error
    except OSError as error:  # URLError, a refused or dropped connection, a timeout
        raise TransientRewardError(f"{url} cannot be reached: {error}") from error
    except ValueError as error:
        raise InvalidRewardError(f"{url} did not answer with JSON: {error}") from error


def _openrlhf_fields(samples: Samples) -> dict[str, list[str]]:
    prompts = [_text(sample) for sample in samples]
    queries = [prompt + sample.completion for prompt, sample in zip(prompts, samples, strict=True)]
    return {"queries": queries, "prompts": prompts, "labels": [sample.answer for sample in samples]}


def _openrlhf_verdicts(returned: Any) -> Any:
    result = _plain(returned)
    if not isinstance(result, Mapping):
        return _listed(result)
    if "rewards" not in result:
        raise InvalidRewardError(f"the answer has no 'rewards': it has {', '.join(map(str, result)) or 'nothing'}.")
    values = _listed(result["rewards"])
    if not isinstance(values, list):
        return values
    logs = {"scores": result["scores"]} if "scores" in result else {}
    logs |= result.get("extra_logs") or {}
    for name, column in logs.items():
        if not isinstance(column, list) or len(column) != len(values):
            raise InvalidRewardError(f"{name!r} must have one number for each of the {len(values)} rewards.")
    return [
        value if isinstance(value, Abstain) else Score(value, parts={key: _scalar(logs[key][row]) for key in logs})
        for row, value in enumerate(values)
    ]


_ADAPTERS: dict[str, Callable[[Foreign, Callable[..., Any]], Callable[..., Any]]] = {
    "trl": trl,
    "verl": verl,
    "openrlhf": openrlhf,
}


# --- words ------------------------------------------------------------------------------------------------------------


def _adapted(
    function: Callable[..., Any],
    arguments: Callable[[Any, Mapping[str, Any]], Arguments],
    verdicts: Callable[[Any], Any],
    taken: Iterable[str] = (),
    any_params: bool = False,
) -> Callable[..., Any]:
    """`function` as a reward: sync or async as it is; its own parameters, less those `taken`, come from `params`."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapped(seen: Any, **params: Any) -> Any:
            positional, named = arguments(seen, params)
            return verdicts(await function(*positional, **named))
    else:

        @functools.wraps(function)
        def wrapped(seen: Any, **params: Any) -> Any:
            positional, named = arguments(seen, params)
            return verdicts(function(*positional, **named))

    wrapped.__signature__ = _signature(function, set(taken), any_params)  # type: ignore[attr-defined]
    return wrapped


def _signature(function: Callable[..., Any], taken: set[str], any_params: bool) -> inspect.Signature:
    own: list[inspect.Parameter] = []
    for parameter in _parameters(function):
        if parameter.kind is parameter.VAR_KEYWORD:
            own.append(parameter)
        elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name not in taken:
            own.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    anything = [inspect.Parameter("params", inspect.Parameter.VAR_KEYWORD)]
    first = inspect.Parameter("seen", inspect.Parameter.POSITIONAL_ONLY)
    return inspect.Signature([first, *(anything if any_params else own)])


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _text(sample: RewardInput) -> str:
    return "\n\n".join(message["content"] for message in sample.messages)


def _listed(returned: Any) -> Any:
    """One value for each sample, None as an abstention; what is no list is left for the registry to refuse."""
    values = _plain(returned)
    if not isinstance(values, list):
        return values
    return [Abstain("the function returned None") if value is None else _scalar(value) for value in values]


def _scalar(value: Any) -> Any:
    """The number in `[number]`: a tensor may have shape [N, 1]."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _plain(value: Any) -> Any:
    """Numbers, lists and dicts out of tensors and arrays, torch's or NumPy's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
