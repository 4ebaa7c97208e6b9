"""The formulas of all algorithms as plain float64 loops, which share nothing with the package that they check.

Each takes the samples and the policy's log-probs, and returns the loss of the optimiser step and its analytic gradient
by (row, token). Where a formula has a stop-gradient, the gradient is the one on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tests.rlhf.toy_world import Source

Table = list[list[float]]
Token = tuple[int, int]
Found = tuple[float, dict[Token, float]]
Terms = dict[Token, tuple[float, float]]
"""(row, token) -> the loss of the token and the slope of the row's loss in its log-prob."""


# --- advantages -------------------------------------------------------------------------------------------------------


def members(source: Source) -> list[list[int]]:
    """The rows of the same group, for each row."""
    groups = source.group_index.tolist()
    return [[j for j, other in enumerate(groups) if other == group] for group in groups]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float], ddof: int = 0) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - ddof))


def centred(rewards: list[float], source: Source) -> list[float]:
    return [r - mean([rewards[j] for j in same]) for r, same in zip(rewards, members(source), strict=True)]


def zscores(rewards: list[float], source: Source, std_ddof: int = 0, std_eps: float = 1e-6) -> list[float]:
    found = []
    for r, same in zip(rewards, members(source), strict=True):
        values = [rewards[j] for j in same]
        found.append((r - mean(values)) / (deviation(values, std_ddof) + std_eps))
    return found


def less_overlong(
    rewards: list[float], source: Source, overlong_max_tokens: int | None = None, overlong_buffer_tokens: int = 1
) -> list[float]:
    if overlong_max_tokens is None:
        return zscores(rewards, source)
    shaped = []
    for r, tokens in zip(rewards, places(source), strict=True):
        over = len(tokens) - (overlong_max_tokens - overlong_buffer_tokens)
        shaped.append(r if over <= 0 else r - min(over / overlong_buffer_tokens, 1.0))
    return zscores(shaped, source)


def against_the_others(rewards: list[float], source: Source) -> list[float]:
    found = []
    for i, same in enumerate(members(source)):
        others = [rewards[j] for j in same if j != i]
        found.append(rewards[i] - mean(others) if others else 0.0)
    return found


def agapo_advantages(
    rewards: list[float], source: Source, all_incorrect: str = "literal", all_incorrect_constant: float = 0.1
) -> list[float]:
    correct, local = source.correct.tolist(), against_the_others(rewards, source)
    unsolved = [not any(correct[j] for j in same) for same in members(source)]
    if all_incorrect == "batch_baseline":
        local = [r - mean(rewards) if lost else a for r, a, lost in zip(rewards, local, unsolved, strict=True)]
    scaled = [(a - mean(local)) / (deviation(local) + 1e-6) for a in local]
    taken_off = all_incorrect_constant if all_incorrect == "constant" else 0.0
    return [a - taken_off if lost else a for a, lost in zip(scaled, unsolved, strict=True)]


# --- policy losses ----------------------------------------------------------------------------------------------------


def places(source: Source) -> list[list[int]]:
    """The tokens on the loss mask, row by row."""
    return [[t for t, on in enumerate(row) if on] for row in source.loss_mask.tolist()]


def clipped(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """The loss and its slope in the logarithm of the ratio."""
    free, cut = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
    return -min(free, cut), -free if free <= cut else 0.0


def clip_tokens(
    source: Source, logprobs: Table, advantages: Table, clip_low: float = 0.2, clip_high: float = 0.2
) -> Terms:
    proximal, terms = source.proximal_logprobs.tolist(), {}
    for i, tokens in enumerate(places(source)):
        for t in tokens:
            ratio = math.exp(logprobs[i][t] - proximal[i][t])
            terms[i, t] = clipped(ratio, advantages[i][t], clip_low, clip_high)
    return terms


def clip_rows(
    source: Source, logprobs: Table, advantages: Table, *, of_means: bool, clip_low: float = 0.2, clip_high: float = 0.2
) -> Terms:
    proximal, terms = source.proximal_logprobs.tolist(), {}
    for i, tokens in enumerate(places(source)):
        gaps = [logprobs[i][t] - proximal[i][t] for t in tokens]
        for t in tokens:
            ratio = math.exp(mean(gaps) if of_means else sum(gaps))
            loss, slope = clipped(ratio, advantages[i][t], clip_low, clip_high)
            terms[i, t] = loss if of_means else loss / len(tokens), slope
    return terms


def truncated(source: Source, logprobs: Table, advantages: Table, *, over: str, cap: float) -> Terms:
    divisor, terms = getattr(source, over).tolist(), {}
    for i, tokens in enumerate(places(source)):
        for t in tokens:
            weight = min(math.exp(logprobs[i][t] - divisor[i][t]), cap) * advantages[i][t]
            terms[i, t] = -weight * logprobs[i][t], -weight
    return terms


def plain(source: Source, logprobs: Table, advantages: Table) -> Terms:
    tokens = [(i, t) for i, row in enumerate(places(source)) for t in row]
    return {(i, t): (-advantages[i][t] * logprobs[i][t], -advantages[i][t]) for i, t in tokens}


# --- correction and KL ------------------------------------------------------------------------------------------------


def correction_weights(
    source: Source, logprobs: Table, advantages: Table, kind: str, **bounds: float
) -> dict[Token, float]:
    proximal, rollout, found = source.proximal_logprobs.tolist(), source.rollout_logprobs.tolist(), {}
    for i, tokens in enumerate(places(source)):
        gaps = {t: proximal[i][t] - rollout[i][t] for t in tokens}
        whole = math.exp(sum(gaps.values()))
        for t in tokens:
            k = math.exp(gaps[t])
            if kind == "icepop":
                weight = k if bounds["low"] <= k <= bounds["high"] else 0.0
            elif kind == "tis_token":
                weight = min(k, bounds["cap"])
            elif kind == "tis_sequence":
                weight = min(whole, bounds["cap"])
            elif kind == "sequence_mask":
                weight = whole if whole <= bounds["cap"] else 0.0
            elif kind == "geometric_mask":
                weight = float(bounds["low"] <= math.exp(mean(list(gaps.values()))) <= bounds["high"])
            elif kind == "off_policy_sequence_mask":
                moved = mean([proximal[i][s] - logprobs[i][s] for s in tokens])
                negative = mean([advantages[i][s] for s in tokens]) < 0
                weight = 0.0 if negative and moved > bounds["delta"] else 1.0
            else:
                weight = 1.0
            found[i, t] = weight
    return found


def kl_term(estimator: str, lp: float, reference: float, proximal: float) -> tuple[float, float]:
    """Value and slope in `lp`."""
    u, ratio = lp - reference, math.exp(lp - proximal)
    if estimator == "k2":
        return u**2 / 2, u
    value, slope = math.exp(-u) - 1 + u, 1 - math.exp(-u)
    return (value, slope) if estimator == "k3" else (ratio * value, ratio * (value + slope))


# --- the online algorithms --------------------------------------------------------------------------------------------


def weight(source: Source, i: int, reduction: str, fixed_length: int | None = None) -> float:
    sizes = [len(row) for row in places(source)]
    return {
        "sequence_sum": 1 / len(sizes),
        "sequence_mean": 1 / (len(sizes) * max(sizes[i], 1)),
        "token_mean": 1 / max(sum(sizes), 1),
        "fixed_length": 1 / (len(sizes) * (fixed_length or 1)),
    }[reduction]


def online(
    source: Source,
    logprobs: Table,
    *,
    baseline: Callable[..., list[float]],
    policy: Callable[..., Terms],
    reduction: str,
    fixed_length: int | None = None,
    kl: Mapping[str, Any] | None = None,
    correction: Mapping[str, Any] | None = None,
    **options: Any,
) -> Found:
    """`options` go to the policy loss if they are clip bounds and else to the baseline."""
    kl = kl or {"coefficient": 0.0, "estimator": "k3", "placement": "loss"}
    beta, placement = kl["coefficient"], kl["placement"]
    proximal, reference = source.proximal_logprobs.tolist(), source.reference_logprobs.tolist()
    clips = {name: value for name, value in options.items() if name.startswith("clip_")}
    rewards = source.rewards.tolist()
    if placement == "reward":
        for i, tokens in enumerate(places(source)):
            rewards[i] -= beta * sum(proximal[i][t] - reference[i][t] for t in tokens)
    rest = {name: value for name, value in options.items() if name not in clips}
    advantages = [[a] * source.loss_mask.shape[1] for a in baseline(rewards, source, **rest)]
    if placement == "reward_to_go":
        for i, tokens in enumerate(places(source)):
            for t in tokens:
                advantages[i][t] -= beta * sum(logprobs[i][s] - reference[i][s] for s in tokens if s >= t)
    weights = correction_weights(source, logprobs, advantages, **(correction or {"kind": "none"}))
    total, gradient = 0.0, {}
    for (i, t), (loss, slope) in policy(source, logprobs, advantages, **clips).items():
        w = weight(source, i, reduction, fixed_length)
        total += w * weights[i, t] * loss
        gradient[i, t] = w * weights[i, t] * slope
        if placement == "loss":
            value, kl_slope = kl_term(kl["estimator"], logprobs[i][t], reference[i][t], proximal[i][t])
            total += w * beta * value
            gradient[i, t] += w * beta * kl_slope
    return total, gradient


# --- the others -------------------------------------------------------------------------------------------------------


def naive_sft(source: Source, logprobs: Table) -> Found:
    tokens = [(i, t) for i, row in enumerate(source.loss_mask.tolist()) for t, on in enumerate(row) if on]
    loss = -sum(logprobs[i][t] for i, t in tokens) / len(tokens)
    return loss, {token: -1 / len(tokens) for token in tokens}


def naive_mean(source: Source, logprobs: Table, i: int) -> float:
    """The average log-prob of the completion in row i."""
    tokens = [t for t, on in enumerate(source.loss_mask[i].tolist()) if on]
    return sum(logprobs[i][t] for t in tokens) / len(tokens)


def per_row(source: Source, slopes: dict[int, float]) -> dict[Token, float]:
    """The gradient of every token, from the slope of the loss in each row's average log-prob."""
    rows = source.loss_mask.tolist()
    return {(i, t): slope / sum(rows[i]) for i, slope in slopes.items() for t, on in enumerate(rows[i]) if on}


def naive_dpo(
    source: Source,
    logprobs: Table,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss: str = "sigmoid",
    length_normalised: bool = False,
    nll_weight: float = 0.0,
) -> Found:
    reference, pairs = source.reference_logprobs.tolist(), len(source) // 2
    total = 0.0
    slopes: dict[int, float] = {}
    for w, x in [(2 * k, 2 * k + 1) for k in range(pairs)]:
        scale = {i: 1 if length_normalised or loss == "ipo" else sum(source.loss_mask[i].tolist()) for i in (w, x)}
        ratio = {i: scale[i] * (naive_mean(source, logprobs, i) - naive_mean(source, reference, i)) for i in (w, x)}
        delta = ratio[w] - ratio[x]
        if loss == "ipo":
            total += (delta - 1 / (2 * beta)) ** 2 / pairs
            slope = 2 * (delta - 1 / (2 * beta))
        else:
            right = 1 / (1 + math.exp(-beta * delta))
            total -= ((1 - label_smoothing) * math.log(right) + label_smoothing * math.log(1 - right)) / pairs
            slope = -beta * ((1 - label_smoothing) * (1 - right) - label_smoothing * right)
        total -= nll_weight * naive_mean(source, logprobs, w) / pairs
        slopes |= {w: (slope * scale[w] - nll_weight) / pairs, x: -slope * scale[x] / pairs}
    return total, per_row(source, slopes)


def naive_simper(source: Source, logprobs: Table) -> Found:
    pairs = len(source) // 2
    total = 0.0
    slopes: dict[int, float] = {}
    for w, x in [(2 * k, 2 * k + 1) for k in range(pairs)]:
        chosen, rejected = (math.exp(naive_mean(source, logprobs, i)) for i in (w, x))
        total += (-chosen + rejected) / pairs
        slopes |= {w: -chosen / pairs, x: rejected / pairs}
    return total, per_row(source, slopes)


def naive_grouper(source: Source, logprobs: Table) -> Found:
    rewards, groups = source.rewards.tolist(), source.group_index.tolist()
    total = 0.0
    slopes: dict[int, float] = {}
    for i in range(len(rewards)):
        same = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        z, lowest, highest = ((r - mean(same)) / deviation(same) for r in (rewards[i], min(same), max(same)))
        advantage = 2 * (z - lowest) / (highest - lowest) - 1
        slopes[i] = -advantage * math.exp(naive_mean(source, logprobs, i)) / len(same) / len(set(groups))
        total += slopes[i]
    return total, per_row(source, slopes)


ICEPOP = {"kind": "icepop", "low": 0.5, "high": 5.0}
TO_GO = {"coefficient": 1e-3, "estimator": "k1", "placement": "reward_to_go"}
over_rollout = partial(truncated, over="rollout_logprobs", cap=5.0)
over_proximal = partial(truncated, over="proximal_logprobs", cap=5.0)
gspo_rows = partial(clip_rows, of_means=True, clip_low=3e-4, clip_high=4e-4)
rloo_rows = partial(clip_rows, of_means=False)
wide_clip = partial(clip_tokens, clip_high=0.28)

NAIVE: dict[str, Callable[..., Found]] = {
    "agapo": partial(online, baseline=agapo_advantages, policy=plain, reduction="sequence_sum", kl=TO_GO),
    "agapo_offpolicy": partial(online, baseline=agapo_advantages, policy=over_rollout, reduction="sequence_mean"),
    "cispo": partial(online, baseline=zscores, policy=over_proximal, reduction="token_mean"),
    "dapo": partial(online, baseline=less_overlong, policy=wide_clip, reduction="token_mean"),
    "dpo": naive_dpo,
    "dr_grpo": partial(online, baseline=centred, policy=clip_tokens, reduction="fixed_length", fixed_length=7),
    "grouper": naive_grouper,
    "grpo": partial(online, baseline=zscores, policy=clip_tokens, reduction="sequence_mean"),
    "grpo_icepop": partial(online, baseline=centred, policy=clip_tokens, reduction="sequence_mean", correction=ICEPOP),
    "gspo": partial(online, baseline=zscores, policy=gspo_rows, reduction="sequence_mean"),
    "rloo": partial(online, baseline=against_the_others, policy=rloo_rows, reduction="sequence_sum"),
    "sft": naive_sft,
    "simper": naive_simper,
}
"""By the name of the algorithm, with its defaults and `toy_world.SETTINGS`."""
