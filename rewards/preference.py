"""The built-in reward `preference`: what a reward model says of a completion, behind /classify as vLLM serves it.

    gates (no call) -> prompt and completion as a chat -> endpoint -> one finite number -> value

A reward model is a sequence classifier with one label. Its raw score is asked for, without the activation that a server
would put on it. A failed gate is worth the least there is. Whatever else goes wrong is an error and never a value.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rewards.http_endpoint import BudgetSettings, ConnectionSettings, Endpoint, EndpointReplyError, Usage, shared
from rewards.judge.gates import forged, unfit
from rewards.judge.prompts import question_of, template_problem
from rewards.parameter_groups import built, flag, number, one_of, optional, param, text
from rewards.registry import RewardInput, Score, reward

Given = Mapping[str, Any]
_PLACES = frozenset({"prompt", "completion"})


def _template(value: Any) -> str | None:
    return text(value) or template_problem(value, _PLACES, _PLACES)


def _bounds(value: Any) -> str | None:
    """[least, greatest] value."""
    pair = isinstance(value, list | tuple) and len(value) == 2 and not any(map(number(), value))
    return None if pair and value[0] < value[1] else "must be [least, greatest] value, two finite numbers"


@dataclass(frozen=True)
class ModelEndpoint(ConnectionSettings):
    """Where the reward model is: `base_url` with or without /v1, as servers have /classify beside it."""

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/').removesuffix('/v1')}/classify"


@dataclass(frozen=True)
class ShownSettings:
    """What the model is shown: the text after the thinking alone, or all of it; by its chat template, or by this one.

    A longer completion than `max_candidate_chars` is gated.
    """

    final_only: bool = param(flag, True)
    template: str | None = param(optional(_template), None)
    max_candidate_chars: int = param(number(1, whole=True), 20_000)

    def candidate(self, sample: RewardInput) -> tuple[str, str]:
        """(the text to send, ""), or ("", why it is worth the least)."""
        reason = unfit(sample) or ("" if self.final_only else forged(sample.reasoning))
        text = sample.final.strip() if self.final_only else sample.completion.strip()
        if not reason and len(text) > self.max_candidate_chars:
            reason = f"longer than {self.max_candidate_chars} characters"
        return ("", reason) if reason else (text, "")

    def request(self, sample: RewardInput, candidate: str) -> dict[str, Any]:
        if self.template is not None:
            return {"input": self.template.format(prompt=question_of(sample), completion=candidate)}
        messages = [dict(message) for message in sample.messages]
        return {"messages": [*messages, {"role": "assistant", "content": candidate}], "add_generation_prompt": False}


@dataclass(frozen=True)
class ValueSettings:
    """How a score becomes a value."""

    transform: Literal["sigmoid", "none"] = param(one_of("sigmoid", "none"), "sigmoid")
    scale: float = param(number(), 1.0)
    offset: float = param(number(), 0.0)
    clip: tuple[float, float] | None = param(optional(_bounds), None)

    def problems(self) -> list[str]:
        if self.transform == "none" and self.clip is None:
            fix = "Set it to the range that matters, such as [-10, 10]"
            return [f"clip = None: must be given with transform: none. A gated completion is worth the least. {fix}."]
        if self.transform == "sigmoid" and self.clip is not None:
            return [f"clip = {self.clip!r}: needs transform: none. A sigmoid is between 0 and 1. Remove it."]
        return []

    @property
    def least(self) -> float:
        return 0.0 if self.clip is None else float(self.clip[0])

    def value(self, raw: float) -> float:
        shifted = self.scale * raw + self.offset
        if self.clip is None:
            return 1.0 / (1.0 + math.exp(-shifted)) if shifted > -700.0 else 0.0
        return min(float(self.clip[1]), max(float(self.clip[0]), shifted))


@dataclass
class RewardModel(Endpoint):
    who: ClassVar[str] = "reward model"


@reward("preference", low=-math.inf, high=math.inf, requires=("httpx",))
async def preference(
    sample: RewardInput,
    *,
    endpoint: Given,
    transform: str = "sigmoid",
    scale: float = 1.0,
    offset: float = 0.0,
    clip: tuple[float, float] | None = None,
    prompt: Given | None = None,
    budget: Given | None = None,
) -> Score:
    """A reward model's score s as sigmoid(scale * s + offset), in [0, 1]; with transform none as that sum, in `clip`.

    `endpoint` is any server with vLLM's /classify: {base_url, model, api_key_env, deadline_s, attempt_s, retries,
    concurrency, ...}; in a run {server: NAME} is one of its own. `prompt` is {final_only: true, template: null,
    max_candidate_chars}: what the model is shown; a template, such as "{prompt}\\n\\n{completion}", is for a model
    without a chat template. A completion that is empty, truncated, too long or has tokens of a chat template is worth
    the least, 0 or clip[0], and costs no call. Parts: raw, calls, tokens, gated. Raises TransientRewardError when no
    score can be had in time, EndpointReplyError for a reply without exactly one finite score, EndpointRefusedError,
    EndpointBudgetError, ConfigError for wrong parameters.
    """
    values = {"transform": transform, "scale": scale, "offset": offset, "clip": clip}
    value, shown = built(ValueSettings, "params", values), built(ShownSettings, "prompt", prompt or {})
    where = built(ModelEndpoint, "endpoint", endpoint)
    server = shared(RewardModel, where, built(BudgetSettings, "budget", budget or {}))
    candidate, gated = shown.candidate(sample)
    if gated:
        return Score(value.least, f"gate: {gated}", {"gated": 1.0})
    usage, deadline = Usage(), asyncio.get_running_loop().time() + where.deadline_s
    body = {"model": where.model, "use_activation": False, **shown.request(sample, candidate)}
    raw = score_of(await server.ask(body, deadline, usage))
    return Score(value.value(raw), f"scored {raw:g}", {"raw": raw, **usage.parts, "gated": 0.0})


def score_of(answer: Mapping[str, Any]) -> float:
    """The one score in a reply of /classify. Raises EndpointReplyError for anything else."""
    try:
        (entry,) = answer["data"]
        (score,) = entry["probs"]
    except (KeyError, TypeError, ValueError):
        shape = "data: [{probs: [score]}]. Is the model a sequence classifier with one label?"
        raise EndpointReplyError(f"the reply of the reward model has not exactly one score, as {shape}") from None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise EndpointReplyError(f"the reward model's score is {str(score)[:40]!r}: it must be a finite number")
    return float(score)
