"""The built-in reward `science`: a rule decides first, a judge only about what the rule calls wrong."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from rewards.math import math
from rewards.multiple_choice import multiple_choice
from rewards.registry import Abstain, RewardInput, Score, reward


@reward("science")
async def science(
    sample: RewardInput, judge: str | None = None, judge_params: dict[str, Any] | None = None
) -> Score | Abstain:
    """1.0 when the rule says right, else what the judge says, else 0.0.

    The rule is `multiple_choice` for records with `metadata.options`, `math` for all others. `judge` names an async
    callable, `package.module:function`, that is called as `function(sample, **judge_params)` and returns what a reward
    returns, in [0, 1]. Options are decided by the rule alone, as is an empty answer: no judge is asked to be generous.
    Part `rule` is the rule's verdict; part `judge` the judge's, where it was asked. Whatever the judge raises is
    raised.
    """
    options = bool(sample.metadata.get("options"))
    verdict = multiple_choice(sample) if options else math(sample)
    parts = {"rule": verdict.value}
    if verdict.value == 1.0 or judge is None or options or not sample.final.strip():
        return Score(verdict.value, f"rule: {verdict.reason}", parts)
    opinion = await judge_named(judge)(sample, **(judge_params or {}))
    if isinstance(opinion, Abstain):
        return opinion
    score = opinion if isinstance(opinion, Score) else Score(opinion)
    value: Any = score.value
    if not isinstance(value, int | float):
        raise TypeError(
            f"judge = {judge!r} returned {opinion!r}: must be a number, Score or Abstain. Correct the judge"
        )
    return Score(value, f"judge: {score.reason}", {**score.parts, **parts, "judge": float(value)})


def judge_named(path: str) -> Callable[..., Awaitable[Any]]:
    """The async callable at `package.module:function`. ValueError when there is none."""
    module, _, name = path.partition(":")
    fix = "Correct rewards.components.science.params.judge"
    if not (module and name):
        raise ValueError(f"judge = {path!r}: must look like package.module:function. It is imported. {fix}")
    found = getattr(importlib.import_module(module), name, None)
    if not inspect.iscoroutinefunction(found):
        raise ValueError(f"judge = {path!r}: must be an async function. {found!r} is none. {fix}")
    return found
