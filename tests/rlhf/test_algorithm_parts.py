"""The parts of online algorithms, every one with every algorithm: corrections, and estimators and places of the KL."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf import algorithms
from rlhf.algorithms.correction import Correction
from rlhf.algorithms.kl import Estimator, Placement
from rlhf.batches import TrainBatch
from tests.rlhf.naive_loops import NAIVE
from tests.rlhf.toy_world import (
    F64,
    SETTINGS,
    advantages_of,
    assert_agrees,
    assert_same,
    batch_for,
    built,
    loss_and_gradient,
    policy_logprobs,
    reduced,
    samples_of,
    toy_source,
)

ONLINE = [name for name in algorithms.names() if built(name).needs.rollouts]
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tis_token": {"cap": 2.0},
    "tis_sequence": {"cap": 2.0},
    "icepop": {"low": 0.5, "high": 5.0},
    "sequence_mask": {"cap": 2.0},
    "geometric_mask": {"low": 0.7, "high": 1.4},
    "off_policy_sequence_mask": {"delta": 0.1},
}
KLS = list(product(get_args(Estimator), get_args(Placement)))
NO_KL = ("", "")


def settings(correction: str, kl: tuple[str, str]) -> dict[str, Any]:
    estimator, placement = kl
    term = {"coefficient": 0.3, "estimator": estimator, "placement": placement} if kl != NO_KL else {"coefficient": 0.0}
    return {"kl": term, "correction": {"kind": correction, **CORRECTIONS[correction]}}


def refusal(name: str, correction: str, kl: tuple[str, str]) -> str | None:
    """The message, or None where the combination is built."""
    try:
        built(name, **settings(correction, kl))
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return None


# Token by token what a sequence has once; a gap counted twice.
REFUSED_CORRECTIONS = {
    "gspo": {"tis_token", "icepop"},
    "rloo": {"tis_token", "icepop"},
    "agapo_offpolicy": set(CORRECTIONS) - {"none"},
}
# What has not the gradient of a KL there, whatever the algorithm.
REFUSED_KLS = {("k1", "loss"), *product(("k2", "k3", "k3_weighted"), ("reward", "reward_to_go"))}
REFUSED_KLS_OF = {"gspo": {("k1", "reward_to_go")}, "rloo": {("k1", "reward_to_go")}}

EVERY = list(product(ONLINE, CORRECTIONS, [NO_KL, *KLS]))
REFUSED = {
    (name, correction, kl)
    for name, correction, kl in EVERY
    if kl in REFUSED_KLS | REFUSED_KLS_OF.get(name, set()) or correction in REFUSED_CORRECTIONS.get(name, set())
}
every_combination = pytest.mark.parametrize(
    ("name", "correction", "kl"),
    [pytest.param(n, c, k, id="-".join(filter(None, [n, c, *k]))) for n, c, k in EVERY if (n, c, k) not in REFUSED],
)


def test_every_kind_of_correction_is_here() -> None:
    union = get_args(Correction)[0]
    assert set(CORRECTIONS) == {get_args(part.model_fields["kind"].annotation)[0] for part in get_args(union)}


def test_exactly_these_combinations_are_refused() -> None:
    assert {combination for combination in EVERY if refusal(*combination)} == REFUSED
    assert len(EVERY) - len(REFUSED) == 6 * 7 * 6 + 2 * 5 * 5 + 6


def test_a_refusal_names_the_key_the_reason_and_the_fix() -> None:
    for message in {refusal(*combination) for combination in REFUSED}:
        assert message is not None
        rule, reason, fix = message.removeprefix("Value error, ").split(". ")
        assert "must" in rule and rule.split()[0] in ("kl.placement", "correction", "correction.kind", "estimator")
        assert reason
        assert fix.startswith(("Use ", "Leave "))


@every_combination
def test_loss_and_gradient_agree_with_a_naive_float64_loop(name: str, correction: str, kl: tuple[str, str]) -> None:
    parts = settings(correction, kl)
    algorithm = built(name, **parts)
    batch = batch_for(algorithm)
    logprobs = policy_logprobs(algorithm, batch).detach()
    naive = NAIVE[name](toy_source(), logprobs.tolist(), **parts | {"kl": parts["kl"] if kl != NO_KL else None})
    assert_agrees(algorithm, batch, naive, logprobs)


@every_combination
def test_the_layout_and_what_stands_off_the_mask_do_not_matter(name: str, correction: str, kl: tuple[str, str]) -> None:
    algorithm = built(name, **settings(correction, kl))
    batch = batch_for(algorithm)
    assert_same(algorithm, batch, off_mask(batch, math.nan), token_budget=20, ranks=2)


def off_mask(batch: Any, junk: float) -> Any:
    """The batch with `junk` off the loss mask in every table but the weights."""
    tables = {i.name: getattr(batch, i.name) for i in fields(batch) if i.name != "token_weights"}
    return replace(batch, **{n: v.masked_fill(~batch.loss_mask, junk) for n, v in tables.items() if is_table(v)})


def is_table(values: Tensor) -> bool:
    return values.dtype == F64 and values.ndim == 2


@every_combination
def test_gradient_flows_into_the_policy_on_the_mask_alone(name: str, correction: str, kl: tuple[str, str]) -> None:
    algorithm = built(name, **settings(correction, kl))
    clean = batch_for(algorithm)
    batch = off_mask(clean, math.inf)
    found = {i.name: v.clone().requires_grad_() for i in fields(batch) if (v := getattr(batch, i.name)).dtype == F64}
    weights = found.pop("token_weights").detach()
    logprobs = policy_logprobs(algorithm, clean).detach().masked_fill(~batch.loss_mask, math.nan).requires_grad_()
    reduced(algorithm, logprobs, replace(batch, **found, token_weights=weights)).backward()
    assert logprobs.grad is not None
    assert logprobs.grad[batch.loss_mask].isfinite().all()
    assert logprobs.grad[batch.loss_mask].norm() > 1e-3
    # What is computed off the mask may be NaN, as the mask of the learner selects; a gradient that leaves it may not.
    assert logprobs.grad[~batch.loss_mask].nan_to_num().abs().sum() == 0
    assert all(value.grad is None for value in found.values())


# --- what each part does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in CORRECTIONS if kind != "none"])
def test_every_correction_acts_on_the_batch_of_these_tests_and_multiplies_the_policy_loss_alone(kind: str) -> None:
    kl = {"coefficient": 0.3, "estimator": "k3", "placement": "loss"}
    with_it, without = built("grpo", **settings(kind, ("k3", "loss"))), built("grpo", kl=kl)
    plain, batch = built("grpo"), batch_for(without)
    assert isinstance(batch, TrainBatch)
    logprobs = policy_logprobs(plain, batch).detach()
    weights = with_it.correction.weights(logprobs, batch, batch.advantages)  # type: ignore[attr-defined]
    assert (weights != 1)[batch.loss_mask].double().mean() > 0.02
    policy = plain.token_loss(logprobs, batch).loss
    penalty = without.token_loss(logprobs, batch).loss - policy
    found = with_it.token_loss(logprobs, batch).loss
    difference = (found - weights * policy - penalty)[batch.loss_mask]
    assert difference.abs().max() < 1e-14
    masked = with_it.token_loss(logprobs, batch).metrics["mismatch/masked_fraction"]
    assert torch.equal(masked, (weights == 0).to(F64))
    if kind in ("icepop", "sequence_mask", "geometric_mask", "off_policy_sequence_mask"):
        assert 0.05 < masked[batch.loss_mask].mean() < 0.95


def test_a_masked_token_stays_in_the_denominator() -> None:
    algorithm = built("grpo", **settings("icepop", NO_KL))
    batch = batch_for(algorithm)
    assert torch.equal(batch.token_weights, batch_for(built("grpo")).token_weights)


def test_with_coefficient_zero_the_kl_part_is_not_there_whatever_its_estimator() -> None:
    batch = batch_for(built("grpo"))
    without = replace(batch, reference_logprobs=torch.zeros(len(batch), 0, dtype=F64))
    expected = loss_and_gradient(built("grpo"), batch)
    for estimator, placement in KLS:
        if (estimator, placement) in REFUSED_KLS:
            continue
        algorithm = built("grpo", kl={"coefficient": 0.0, "estimator": estimator, "placement": placement})
        assert not algorithm.needs.reference_logprobs
        found = loss_and_gradient(algorithm, without)
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ONLINE)
def test_needs_follow_the_parts(name: str) -> None:
    weighs = name == "agapo_offpolicy"
    for correction, kl in product(CORRECTIONS, [NO_KL, ("k3", "loss")]):
        if (name, correction, kl) in REFUSED:
            continue
        needs = built(name, **settings(correction, kl)).needs
        assert needs.data == "rollouts"
        assert needs.reference_logprobs == (kl != NO_KL)
        assert needs.importance_ratio == (weighs or correction != "none")
        assert needs.on_policy == (name == "agapo")
        assert needs.group_baseline


def test_a_kl_in_the_reward_is_taken_off_before_the_baseline() -> None:
    source = toy_source()
    algorithm = built("rloo", kl={"coefficient": 0.3, "estimator": "k1", "placement": "reward"})
    spent = torch.where(source.loss_mask, source.proximal_logprobs - source.reference_logprobs, 0.0).sum(-1)
    expected = advantages_of(built("rloo"), replace(source, rewards=source.rewards - 0.3 * spent))
    torch.testing.assert_close(advantages_of(algorithm, source), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("name", "kl"), [(n, k) for n, c, k in EVERY if c == "none" and (n, c, k) not in REFUSED])
def test_the_kl_of_samples_is_looked_at_only_in_the_reward(name: str, kl: tuple[str, str]) -> None:
    algorithm, samples = built(name, **settings("none", kl)), samples_of(toy_source())
    in_reward = kl == ("k1", "reward")
    assert algorithm.needs.kl_in_reward == in_reward
    without, broken = torch.zeros(12, dtype=F64), torch.full((12,), math.nan, dtype=F64)
    found = algorithm.advantages(samples, broken)  # type: ignore[attr-defined]
    assert torch.equal(found, algorithm.advantages(samples, without)) != in_reward  # type: ignore[attr-defined]


def test_the_settings_of_these_tests_name_algorithms_that_there_are() -> None:
    assert SETTINGS.keys() <= set(algorithms.names())
