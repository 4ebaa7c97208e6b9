"""The built-in rewards `judge` and `judge_pairwise`: a language model behind any OpenAI-compatible endpoint decides."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from rewards.http_endpoint import BudgetSettings, shared
from rewards.judge.bench import Bench, Opinion, all_of
from rewards.judge.canaries import CanaryWatch
from rewards.judge.chat import ChatEndpoint
from rewards.judge.forms import Allowed, Form
from rewards.judge.gates import gate
from rewards.judge.memory import VerdictCache
from rewards.judge.prompts import PromptText, question_of
from rewards.judge.settings import CacheSettings, CanarySettings, EndpointSettings, PromptSettings, RubricSettings
from rewards.parameter_groups import built
from rewards.registry import Abstain, RewardInput, Score, reward
from rlhf.errors import ConfigError, DataError, did_you_mean

Given = Mapping[str, Any]
MODES = ("reference", "rubric")
AGAINST = ("group", "reference")


@reward("judge", requires=("httpx",))
async def judge(
    sample: RewardInput,
    *,
    endpoint: Given,
    mode: str = "reference",
    prompt: Given | None = None,
    rubric: Given | None = None,
    canaries: Given | None = None,
    cache: Given | None = None,
    budget: Given | None = None,
) -> Score:
    """In [0, 1]. `reference`: is the final answer the record's? `rubric`: the weighted mean of the dimensions' grades.

    The groups are those of `rewards.judge.settings`. A completion that fails a gate is 0.0 and costs no call. With
    `endpoint.top_logprobs` and a server that returns them, `reference` gives the probability of correct. Parts: calls,
    tokens, cached, gated, and the dimensions' grades. Raises TransientRewardError when no verdict can be had in time,
    EndpointReplyError for a reply that is no verdict, EndpointRefusedError, EndpointBudgetError, JudgeUnreliableError
    after the canaries' alarm, DataError for a record without an answer in mode reference, ConfigError.
    """
    if mode not in MODES:
        fix = "judge_pairwise compares completions." if mode == "pairwise" else did_you_mean(str(mode), MODES)
        raise ConfigError([f"mode = {mode!r}: must be {' or '.join(MODES)}. There is no other. {fix}"])
    if mode == "reference" and rubric is not None:
        raise ConfigError([f"rubric = {rubric!r}: must be left out in mode reference. It has none. Set mode: rubric."])
    if mode == "reference" and not sample.answer.strip():
        raise DataError("answer = '': must not be empty in mode reference. Nothing could be right. Fix the record.")
    bench = _bench(mode, endpoint=endpoint, prompt=prompt, rubric=rubric, canaries=canaries, cache=cache, budget=budget)
    candidate, gated = gate(sample, _prompt(prompt), short=mode == "reference")
    if gated:
        return _gated(gated)
    texts = {"question": question_of(sample), "reference": sample.answer, "candidate": candidate}
    opinion = await bench.opinion(texts, _deadline(bench))
    grades = {name: float(grade) for name, grade in opinion.fields.items() if isinstance(grade, int)}
    return Score(_value(opinion, _rubric(rubric)), _said(opinion, candidate), {**opinion.parts, **grades, "gated": 0.0})


@reward("judge_pairwise", group=True, requires=("httpx",))
async def judge_pairwise(
    samples: Sequence[RewardInput],
    *,
    endpoint: Given,
    against: str = "group",
    prompt: Given | None = None,
    canaries: Given | None = None,
    cache: Given | None = None,
    budget: Given | None = None,
) -> list[Score | Abstain]:
    """The share of comparisons won, a tie as half of one: against the others of the group, or the record's answer.

    Every pair is shown in both orders; two orders that disagree are a tie. A completion that fails a gate is 0.0, and
    loses against the others without a call. One without others to be compared with abstains. Raises as `judge`.
    """
    if against not in AGAINST:
        fix = did_you_mean(str(against), AGAINST)
        raise ConfigError([f"against = {against!r}: must be {' or '.join(AGAINST)}. There is no other. {fix}"])
    if against == "reference" and any(not sample.answer.strip() for sample in samples):
        raise DataError("answer = '': must not be empty with against: reference. It is the opponent. Fix the record.")
    bench = _bench("pairwise", endpoint=endpoint, prompt=prompt, canaries=canaries, cache=cache, budget=budget)
    if against == "group" and len(samples) == 1:
        return [Abstain("no other completion in the group")]
    gated = [gate(sample, _prompt(prompt), short=False) for sample in samples]
    compare = _against_reference if against == "reference" else _against_each_other
    results = await compare(bench, samples, [text for text, _ in gated])
    return [_gated(why) if why else _won(own) for (_, why), own in zip(gated, results, strict=True)]


async def verdict(sample: RewardInput, **params: Any) -> Score:
    """`judge` in mode reference, for `science(judge="rewards.judge:verdict", judge_params={endpoint: ...})`."""
    known = set(inspect.signature(judge).parameters) - {"sample", "mode", "rubric"}
    problems = [
        f"judge_params.{name} = {value!r}: there is no such parameter. {did_you_mean(name, known)}"
        for name, value in params.items()
        if name not in known
    ]
    if "endpoint" not in params:
        problems.append("judge_params.endpoint: must be given. It says where the judge is. Set base_url and model.")
    if problems:
        raise ConfigError(problems)
    score: Score = await judge(sample, **params)
    return score


# --- comparisons ------------------------------------------------------------------------------------------------------


async def _against_reference(bench: Bench, samples: Sequence[RewardInput], texts: Sequence[str]) -> list[list[float]]:
    deadline = _deadline(bench)
    played = [(row, text) for row, text in enumerate(texts) if text]
    work = [_compared(bench, samples[row], text, samples[row].answer.strip(), deadline) for row, text in played]
    results: list[list[float]] = [[] for _ in texts]
    for (row, _), result in zip(played, await all_of(work), strict=True):
        results[row].append(result)
    return results


async def _against_each_other(bench: Bench, samples: Sequence[RewardInput], texts: Sequence[str]) -> list[list[float]]:
    """For each row what it got from each of the others; a gated one ("") loses without being shown."""
    deadline = _deadline(bench)
    shown = [row for row, text in enumerate(texts) if text]
    pairs = list(combinations(shown, 2))
    work = [_compared(bench, samples[one], texts[one], texts[other], deadline) for one, other in pairs]
    results = [[1.0] * (len(texts) - len(shown)) if text else [] for text in texts]
    for (one, other), result in zip(pairs, await all_of(work), strict=True):
        results[one].append(result)
        results[other].append(1.0 - result)
    return results


async def _compared(bench: Bench, sample: RewardInput, one: str, other: str, deadline: float) -> float:
    """1.0 when `one` is better in both orders, 0.0 when `other` is, else 0.5."""
    if one == other:
        return 0.5
    asked = {"question": question_of(sample)}
    orders = ({**asked, "first": one, "second": other}, {**asked, "first": other, "second": one})
    there, back = await all_of([bench.opinion(texts, deadline) for texts in orders])
    winners = (there.fields["winner"], back.fields["winner"])
    return {("first", "second"): 1.0, ("second", "first"): 0.0}.get(winners, 0.5)


# --- scores -----------------------------------------------------------------------------------------------------------


def _gated(reason: str) -> Score:
    return Score(0.0, f"gate: {reason}", {"gated": 1.0})


def _won(results: Sequence[float]) -> Score:
    shares = {name: results.count(value) / len(results) for name, value in (("won", 1.0), ("tied", 0.5), ("lost", 0.0))}
    counts = " ".join(f"{name} {round(share * len(results))}" for name, share in shares.items())
    return Score(sum(results) / len(results), f"{counts} of {len(results)}", {**shares, "gated": 0.0})


def _value(opinion: Opinion, rubric: RubricSettings | None) -> float:
    if rubric is not None:
        return rubric.value(opinion.fields)
    return float(opinion.fields["verdict"] == "correct") if opinion.confidence is None else opinion.confidence


def _said(opinion: Opinion, candidate: str) -> str:
    grades = ", ".join(f"{name} {grade}" for name, grade in opinion.fields.items() if isinstance(grade, int))
    return grades or f"{opinion.fields['verdict']}: {candidate[:80]}"


# --- what lives as long as the process --------------------------------------------------------------------------------

_BENCHES: dict[str, Bench] = {}
_CACHES: dict[str, VerdictCache] = {}


def counts() -> dict[str, int]:
    """What the judges of this process did: calls, retries, tokens, cache_hits, reply_errors, canaries, ..."""
    total: dict[str, int] = {}
    for counted in {id(bench.endpoint): bench.endpoint.counts for bench in _BENCHES.values()}.values():
        for name, count in counted.items():
            total[name] = total.get(name, 0) + count
    return total


def _bench(mode: str, **given: Any) -> Bench:
    """The bench for these parameters, made once. Equal endpoints share their places, circuit and budget."""
    key = json.dumps([mode, given], sort_keys=True, default=repr)
    if key not in _BENCHES:
        _BENCHES[key] = _built(mode, given)
    return _BENCHES[key]


def _built(mode: str, given: Given) -> Bench:
    settings = built(EndpointSettings, "endpoint", given["endpoint"])
    prompt, rubric = _prompt(given["prompt"]), _rubric(given["rubric"]) if mode == "rubric" else None
    if mode == "rubric" and rubric is None:
        raise ConfigError(["rubric: must be given in mode rubric. It says what is graded. Set rubric.dimensions."])
    canaries = built(CanarySettings, "canaries", given["canaries"] or {})
    form = Form(_fields(mode, rubric), prompt.explain)
    text = PromptText.of(mode, prompt, _dimension_list(rubric) if rubric else "")
    return Bench(
        endpoint=shared(ChatEndpoint, settings, built(BudgetSettings, "budget", given["budget"] or {})),
        text=text,
        form=form,
        watch=CanaryWatch(canaries),
        cache=_cache(built(CacheSettings, "cache", given["cache"] or {})),
        places=("first", "second") if mode == "pairwise" else ("candidate",),
        passed=_passed(rubric, canaries.positive_at) if mode != "pairwise" else _preferred,
        graded="verdict" if mode == "reference" and settings.top_logprobs else "",
    )


def _fields(mode: str, rubric: RubricSettings | None) -> dict[str, Allowed]:
    if rubric is not None:
        return {name: range(rubric.low, rubric.high + 1) for name in rubric.dimensions}
    return {"winner": ("first", "second", "tie")} if mode == "pairwise" else {"verdict": ("correct", "incorrect")}


def _dimension_list(rubric: RubricSettings) -> str:
    scale = f"a whole number from {rubric.low} (worst) to {rubric.high} (best)"
    return "\n".join(f"- {name}, {scale}: {spec['description']}" for name, spec in rubric.dimensions.items())


def _passed(rubric: RubricSettings | None, positive_at: float) -> Callable[[Opinion, str], bool]:
    return lambda opinion, _: _value(opinion, rubric) >= positive_at


def _preferred(opinion: Opinion, place: str) -> bool:
    return bool(opinion.fields["winner"] == place)


def _prompt(given: Given | None) -> PromptSettings:
    return built(PromptSettings, "prompt", given or {})


def _rubric(given: Given | None) -> RubricSettings | None:
    return None if given is None else built(RubricSettings, "rubric", given)


def _cache(settings: CacheSettings) -> VerdictCache:
    key = repr(settings)
    if key not in _CACHES:
        _CACHES[key] = VerdictCache(settings)
    return _CACHES[key]


def _deadline(bench: Bench) -> float:
    return asyncio.get_running_loop().time() + bench.endpoint.settings.deadline_s
