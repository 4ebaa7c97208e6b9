"""Rewards over rows: a `Scorer` of its own, rows in, results out in the same order."""

from __future__ import annotations

import argparse
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rewards.cli.rows import Row, grouped, result_of, text_group
from rewards.scorer import Scorer
from rlhf.config import RewardComponent, RewardsConfig
from rlhf.errors import ConfigError

AHEAD = 4  # groups of rows in flight for each thread: none of them waits, and no more are held


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one row, as `rows.result_of` names it."""

    row: Row
    outcome: Mapping[str, Any]


@dataclass(frozen=True)
class RowService:
    """The rewards of `config` for rows. Close it, or use it in a `with`; raises ConfigError as `Scorer` does."""

    config: RewardsConfig
    scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scorer", Scorer(self.config))

    def __enter__(self) -> RowService:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.scorer.close()

    @property
    def threads(self) -> int:
        """As many calls as the grader processes have use for."""
        beside = any(self.scorer.rewards[name].is_async for name in self.config.components)
        return self.config.process_count + (self.config.async_calls if beside else 0)

    def units(self, name: str, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """What is judged at once: one row, or for a group reward those of one prompt that follow each other."""
        return grouped(iter(rows)) if self.scorer.rewards[name].group else ([row] for row in rows)

    def judged(self, name: str, unit: Sequence[Row]) -> list[Result]:
        """The results of one of `units`."""
        scored = self.scorer.score(text_group(unit, name))
        outcomes = [result_of(outcome, name, scored.seconds) for outcome in scored.outcomes]
        return [Result(row, outcome) for row, outcome in zip(unit, outcomes, strict=True)]

    def results(self, name: str, rows: Iterable[Row]) -> Iterator[Result]:
        """The results of all rows in their order, with a bounded number of them in flight."""
        pending: deque[Future[list[Result]]] = deque()
        threads = ThreadPoolExecutor(self.threads, thread_name_prefix="rows")
        try:
            for unit in self.units(name, rows):
                pending.append(threads.submit(self.judged, name, unit))
                if len(pending) >= AHEAD * self.threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


# --- from the command line --------------------------------------------------------------------------------------------


def rewards_config(options: argparse.Namespace, names: Sequence[str], **settings: Any) -> RewardsConfig:
    """The config of the rewards `names` as the options of the command line say."""
    params = params_of(options.params, names)
    common = {"deadline_s": options.deadline, "retries": options.retries, **settings}
    config = brought_config(options, names, {name: {"params": params[name], **common} for name in names})
    processes = {"processes": options.processes, "memory_limit_mib": options.memory_limit_mib}
    return config.model_copy(update=processes)


def brought_config(
    options: argparse.Namespace, names: Sequence[str], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> RewardsConfig:
    """Where the rewards come from. Raises ConfigError for a path, url, style or range that does not fit the rest."""
    brought = {key: getattr(options, key) for key in ("path", "style", "url", "low", "high") if has(options, key)}
    own = settings or {name: {} for name in names}
    components = {name: RewardComponent.model_validate({**brought, **own[name]}) for name in names}
    if problems := list(_brought_problems(brought)):
        raise ConfigError(problems)
    return RewardsConfig(components=components, modules=tuple(options.module))


def _brought_problems(brought: Mapping[str, Any]) -> Iterator[str]:
    path, url, style = (brought.get(key) for key in ("path", "url", "style"))
    if path and url:
        yield f"--url {url}: must not be given together with --path. Both give values. Remove one."
    if path and not all(path.rpartition(":")[::2]):
        yield f"--path {path}: must be package.module:function or file.py:function. This names no function."
    if url and not url.startswith(("http://", "https://")):
        yield f"--url {url}: must begin with http:// or https://. It is posted to. Correct it."
    if url and style in ("trl", "verl"):
        yield f"--style {style}: must be groupwise or openrlhf with --url. These protocols are spoken over HTTP."
    if not (path or url):
        reason = "A registered function declares that itself. Remove it."
        yield from (f"--{key} {value}: needs --path or --url. {reason}" for key, value in brought.items())
    if brought.get("low", -math.inf) >= brought.get("high", math.inf):
        yield f"--low {brought['low']}: must be below --high. No value lies between. Correct them."


def has(options: argparse.Namespace, key: str) -> bool:
    return getattr(options, key, None) is not None


def params_of(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`key=value` of the only reward, or `name.key=value`; a value is JSON, or else text."""
    params: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in given:
        key, equals, value = text.partition("=")
        name, dot, own = key.rpartition(".")
        name = name if dot else names[0] if len(names) == 1 else ""
        if not equals or name not in params or not own:
            form = "key=value" if len(names) == 1 else f"{'|'.join(names)}.key=value"
            raise ConfigError([f"--params {text}: must be {form}. It sets a parameter of the reward. Correct it."])
        params[name][own] = _json_or_text(value)
    return params


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
