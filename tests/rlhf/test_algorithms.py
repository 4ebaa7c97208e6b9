"""Laws that every algorithm obeys. A new one is covered by being registered; it must only add its naive loop."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf import algorithms
from rlhf.algorithms import Algorithm, registry
from rlhf.algorithms.kl import Kl
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.batches import PreferenceBatch, Rows, TrainBatch
from rlhf.batches.packing import WorkModel, plan_batch
from rlhf.errors import ConfigError
from rlhf.losses.kl import kl_to_go
from rlhf.metrics import merged
from rlhf.training.token_model import Pack
from tests.rlhf.naive_logprobs import logprobs_and_entropy, token_logprobs
from tests.rlhf.naive_loops import NAIVE
from tests.rlhf.toy_world import (
    F64,
    TEMPERATURE,
    VOCABULARY,
    Toy,
    ToyEngine,
    assert_agrees,
    assert_same,
    batch_for,
    built,
    learner,
    loss_and_gradient,
    policy_logprobs,
    reduced,
    sequences_of,
    toy_source,
    unit_size,
    units,
    whole,
    widened,
)

NAMES = algorithms.names()
ONLINE = [name for name in NAMES if built(name).needs.rollouts]
STOPS_GRADIENT = {"agapo", "agapo_offpolicy", "cispo"}
"""Their loss is a surrogate whose value has another derivative; the naive loop has the gradient of the formula."""

every_algorithm = pytest.mark.parametrize("algorithm", [built(name) for name in NAMES], ids=NAMES)
with_rollouts = pytest.mark.parametrize("algorithm", [built(name) for name in ONLINE], ids=ONLINE)
every_name = pytest.mark.parametrize("name", NAMES)


# --- agreement with naive loops ---------------------------------------------------------------------------------------


@every_name
def test_loss_and_gradient_agree_with_a_naive_float64_loop(name: str) -> None:
    assert name in NAIVE, f"write the formula of {name} as a plain loop in naive_loops.NAIVE"
    algorithm = built(name)
    batch = batch_for(algorithm)
    logprobs = policy_logprobs(algorithm, batch).detach()
    assert_agrees(algorithm, batch, NAIVE[name](toy_source(), logprobs.tolist()), logprobs)


def with_name(options: dict[str, list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(n, o, id=f"{n}-{'-'.join(map(str, o.values()))}") for n, found in options.items() for o in found
    ]


@pytest.mark.parametrize(
    ("name", "fields"),
    with_name(
        {
            "dpo": [
                {"beta": 0.7, "label_smoothing": 0.2},
                {"loss": "ipo"},
                {"length_normalised": True, "beta": 2.0},
                {"nll_weight": 0.3, "beta": 0.5},
            ],
            "grpo": [{"std_ddof": 1}, {"std_eps": 0.3}, {"clip_low": 0.1, "clip_high": 0.5}],
            "grpo_icepop": [{"clip_low": 0.3, "clip_high": 0.4}],
            "dapo": [{"overlong_max_tokens": 6, "overlong_buffer_tokens": 4}, {"clip_high": 0.2}],
            "gspo": [{"clip_low": 0.05, "clip_high": 0.3}],
            "rloo": [{"clip_low": 0.5, "clip_high": 1.0}],
            "agapo": [
                {"all_incorrect": "batch_baseline"},
                {"all_incorrect": "constant", "all_incorrect_constant": 0.3},
            ],
            "agapo_offpolicy": [{"all_incorrect": "batch_baseline"}, {"all_incorrect": "constant"}],
        }
    ),
)
def test_options_agree_with_a_naive_float64_loop(name: str, fields: dict[str, Any]) -> None:
    algorithm = built(name, **fields)
    batch = batch_for(algorithm)
    logprobs = policy_logprobs(algorithm, batch).detach()
    assert_agrees(algorithm, batch, NAIVE[name](toy_source(), logprobs.tolist(), **fields), logprobs)
    assert reduced(algorithm, logprobs, batch) != reduced(built(name), logprobs, batch_for(built(name)))


@pytest.mark.parametrize("name", [name for name in ONLINE if name != "agapo"])
def test_the_clip_or_truncation_of_every_algorithm_acts_on_the_batch_of_these_tests(name: str) -> None:
    algorithm = built(name)
    batch = batch_for(algorithm)
    metrics = algorithm.token_loss(policy_logprobs(algorithm, batch), batch).metrics
    acting = {n: v[batch.loss_mask].mean().item() for n, v in metrics.items() if n == "policy/clip_fraction"}
    assert all(0.02 < share < 0.95 for share in acting.values()), acting
    assert acting, f"{name} has to log policy/clip_fraction"
    if name == "grpo_icepop":
        assert 0.05 < metrics["mismatch/masked_fraction"][batch.loss_mask].mean() < 0.95


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STOPS_GRADIENT])
def test_the_gradient_is_that_of_finite_differences_through_the_policy(name: str) -> None:
    algorithm = built(name)
    batch = batch_for(algorithm)
    _, gradient = loss_and_gradient(algorithm, batch)
    weights = torch.nn.utils.parameters_to_vector(Toy().parameters()).detach()

    def loss_at(vector: Tensor) -> float:
        policy = Toy()
        torch.nn.utils.vector_to_parameters(vector, policy.parameters())
        with torch.no_grad():
            return reduced(algorithm, policy_logprobs(algorithm, batch, policy), batch).item()

    for direction in torch.randn(8, len(weights), generator=torch.Generator().manual_seed(2), dtype=F64):
        step = 1e-6 * direction
        slope = (loss_at(weights + step) - loss_at(weights - step)) / 2e-6
        assert slope == pytest.approx((gradient @ direction).item(), rel=1e-6, abs=1e-8)


# --- laws -------------------------------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("extra", [1, 5])
def test_padding_width_and_what_padding_holds_do_not_matter(algorithm: Algorithm, extra: int) -> None:
    batch = batch_for(algorithm)
    wide = widened(batch, extra)
    assert wide.token_ids.shape[1] == batch.token_ids.shape[1] + extra
    logprobs = [policy_logprobs(algorithm, b) for b in (batch, wide)]
    losses = [reduced(algorithm, lp, b) for lp, b in zip(logprobs, (batch, wide), strict=True)]
    gradients = [torch.autograd.grad(loss, lp)[0] for loss, lp in zip(losses, logprobs, strict=True)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-14, rtol=0)
    inside = batch.loss_mask
    width = batch.token_ids.shape[1]
    torch.testing.assert_close(gradients[1][:, :width][inside], gradients[0][inside], atol=1e-14, rtol=0)


@every_algorithm
def test_a_longer_sequence_beside_them_that_trains_nothing_does_not_matter(algorithm: Algorithm) -> None:
    """In one micro-batch it widens the padding of all others."""
    batch = batch_for(algorithm)
    assert_same(algorithm, batch, widened(batch, extra=5, rows=unit_size(algorithm)))


@every_algorithm
def test_what_prompt_positions_hold_does_not_matter(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    floats = {item.name: getattr(batch, item.name) for item in fields(batch) if item.name != "token_weights"}
    dirty = {n: v.masked_fill(~batch.loss_mask, math.nan) for n, v in floats.items() if v.dtype == F64 and v.ndim == 2}
    assert_same(algorithm, batch, replace(batch, **dirty))


@every_algorithm
def test_row_order_does_not_matter(algorithm: Algorithm) -> None:
    source = toy_source()
    batch = batch_for(algorithm, source)
    order = torch.randperm(len(batch) // unit_size(algorithm), generator=torch.Generator().manual_seed(1))
    assert_same(algorithm, batch, batch_for(algorithm, source.rows(units(algorithm, order))))


@every_algorithm
@pytest.mark.parametrize("token_budget", [1, 30, 90])
def test_the_split_into_micro_batches_does_not_matter(algorithm: Algorithm, token_budget: int) -> None:
    batch = batch_for(algorithm)
    assert_same(algorithm, batch, batch, token_budget=token_budget)


@every_algorithm
@pytest.mark.parametrize("ranks", [2, 5, 13])
def test_the_split_over_ranks_does_not_matter(algorithm: Algorithm, ranks: int) -> None:
    batch = batch_for(algorithm)
    assert_same(algorithm, batch, batch, ranks=ranks, token_budget=15)


class StatesOnly(ToyEngine):
    """The hidden states of all tokens of a pack are what trains."""

    def states(self, pack: Pack) -> Tensor:
        if not hasattr(self, "all_states"):
            parts = [self.module.hidden(ids) for ids in pack.token_ids[0].split(list(pack.layout.lengths))]
            self.all_states = torch.cat(parts).detach().requires_grad_()
        return self.all_states.index_select(0, pack.predictors)


@every_algorithm
def test_no_gradient_off_the_loss_mask(algorithm: Algorithm) -> None:
    sequences = sequences_of(batch_for(algorithm))
    engine = StatesOnly(Toy())
    learner(algorithm, engine)[0].update(whole(sequences))
    gradient = engine.all_states.grad
    assert gradient is not None
    predicts = torch.from_numpy(sequences.loss_mask).roll(-1)  # the first token of a sequence is never on the mask
    assert gradient[~predicts].abs().sum() == 0
    assert (gradient[predicts].abs().sum(-1) > 0).float().mean() > 0.3


class AllLogits(ToyEngine):
    """Log-probs and entropy from the logits of all tokens at once, without the package."""

    def head(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(self.module.head(hidden), targets, temperature)


@every_algorithm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_of_logits_give_the_loss_gradient_and_metrics_of_all_logits_at_once(
    algorithm: Algorithm, temperature: float, rows: int
) -> None:
    share = whole(sequences_of(batch_for(algorithm)))
    chunked, at_once = ToyEngine(Toy(), chunk_logits=rows * VOCABULARY), AllLogits(Toy())
    expected = learner(algorithm, at_once, temperature=temperature)[0].update(share)
    found = learner(algorithm, chunked, temperature=temperature)[0].update(share)
    assert abs(found.loss - expected.loss) < 1e-12
    torch.testing.assert_close(chunked.gradient, at_once.gradient, atol=1e-12, rtol=0)
    assert chunked.gradient.norm() > 1e-3
    assert found.metrics.result() == pytest.approx(expected.metrics.result(), abs=1e-12)


@every_algorithm
def test_gradient_flows_into_the_policy_alone(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    floats = {i.name: v.clone().requires_grad_() for i in fields(batch) if (v := getattr(batch, i.name)).dtype == F64}
    weights = floats.pop("token_weights").detach()
    logprobs = torch.full(batch.token_ids.shape, -1.0, dtype=F64, requires_grad=True)
    reduced(algorithm, logprobs, replace(batch, **floats, token_weights=weights)).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().sum() > 0
    assert all(value.grad is None for value in floats.values())


@with_rollouts
def test_at_ratio_one_the_gradient_is_that_of_reinforce(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    assert isinstance(batch, TrainBatch)
    algorithm = algorithm.model_copy(update={"kl": Kl()})
    logprobs = (-torch.rand(batch.token_ids.shape, dtype=F64)).requires_grad_()
    same = logprobs.detach()
    reduced(algorithm, logprobs, replace(batch, proximal_logprobs=same, rollout_logprobs=same)).backward()
    torch.testing.assert_close(logprobs.grad, -batch.advantages[:, None] * batch.token_weights, atol=1e-14, rtol=0)


@every_algorithm
def test_one_sgd_step_raises_the_log_prob_of_what_has_a_positive_advantage(algorithm: Algorithm) -> None:
    if algorithm.needs.data == "pairs":
        pytest.skip("a pair has a completion of either sign; the next test has the law for these")
    batch = batch_for(algorithm, toy_source().rows(torch.tensor([5])))
    if isinstance(batch, PreferenceBatch):
        batch = replace(batch, advantages=torch.ones(1, dtype=F64))
    if isinstance(batch, TrainBatch):
        with torch.no_grad():
            exact = token_logprobs(Toy()(batch.token_ids), batch.token_ids, batch.loss_mask, temperature=TEMPERATURE)
        batch = replace(batch, advantages=torch.ones(1, dtype=F64), proximal_logprobs=exact, rollout_logprobs=exact)
    one, engine = learner(algorithm, rate=1e-2)

    def completion_logprob() -> float:
        values = token_logprobs(engine.module(batch.token_ids), batch.token_ids, batch.loss_mask)
        return values.sum().item()

    before = completion_logprob()
    one.update(whole(sequences_of(batch)))
    assert completion_logprob() > before


@pytest.mark.parametrize("name", ["dpo", "simper"])
def test_one_sgd_step_widens_the_gap_between_the_chosen_and_the_rejected_completion(name: str) -> None:
    algorithm = algorithms.build(name, {})
    batch = batch_for(algorithm, toy_source().rows(torch.tensor([4, 5])))
    one, engine = learner(algorithm, rate=1e-2)

    def gap() -> float:
        values = token_logprobs(engine.module(batch.token_ids), batch.token_ids, batch.loss_mask)
        means = values.sum(-1) / batch.loss_mask.sum(-1) if name == "simper" else values.sum(-1)
        return (means[0] - means[1]).item()

    before = gap()
    one.update(whole(sequences_of(batch)))
    assert gap() > before


@with_rollouts
def test_identical_rewards_give_exactly_zero_advantage_and_no_gradient(algorithm: Algorithm) -> None:
    if not algorithm.needs.group_baseline:
        pytest.skip("without a baseline equal rewards do train")
    batch = batch_for(algorithm, toy_source(torch.full((12,), 0.1, dtype=F64)))
    assert isinstance(batch, TrainBatch)
    assert isinstance(algorithm, OnlineAlgorithm)
    assert batch.advantages.tolist() == [0.0] * 12
    without_kl = algorithm.model_copy(update={"kl": Kl()})
    _, gradient = loss_and_gradient(without_kl, batch)
    assert gradient.abs().sum() == 0
    assert (loss_and_gradient(algorithm, batch)[1].abs().sum() == 0) == (algorithm.kl.coefficient == 0)


def test_where_all_rewards_are_equal_only_the_kl_of_agapo_trains() -> None:
    algorithm = algorithms.build("agapo", {"kl": {"coefficient": 0.3, "estimator": "k1", "placement": "reward_to_go"}})
    batch = batch_for(algorithm, toy_source(torch.full((12,), 0.1, dtype=F64)))
    logprobs = policy_logprobs(algorithm, batch).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(reduced(algorithm, logprobs, batch), logprobs)
    ahead = kl_to_go(logprobs, batch.reference_logprobs, batch.loss_mask)
    torch.testing.assert_close(gradient, 0.3 * ahead * batch.token_weights, atol=1e-14, rtol=0)
    assert gradient.norm() > 1e-3


@every_algorithm
def test_every_metric_is_aligned_with_the_tokens_or_rows_and_detached(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    logprobs = torch.full(batch.token_ids.shape, -1.0, dtype=F64, requires_grad=True)
    found = algorithm.token_loss(logprobs, batch)
    for values in found.metrics.values():
        assert values.shape == batch.token_ids.shape
        assert not values.requires_grad
    for values, rows in found.row_metrics.values():
        assert values.shape == rows.shape == (len(batch),)
        assert rows.dtype == torch.bool
        assert not values.requires_grad


@every_algorithm
def test_the_learner_averages_metrics_over_the_tokens_or_rows_of_all_ranks_and_micro_batches(
    algorithm: Algorithm,
) -> None:
    batch = batch_for(algorithm)
    token_loss = algorithm.token_loss(policy_logprobs(algorithm, batch).detach(), batch)
    expected = {name: values[batch.loss_mask].mean().item() for name, values in token_loss.metrics.items()}
    for name, (values, rows) in token_loss.row_metrics.items():
        expected[name] = values[rows].mean().item()
    sequences = sequences_of(batch)
    shares = plan_batch(sequences, 2, 30, WorkModel()).shares(sequences)
    found = merged(learner(algorithm)[0].update(share).metrics for share in shares).result()
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    beside = {name for name in found if name.startswith(("mismatch/", "policy/")) or name[-4:] in ("_min", "_max")}
    assert found.keys() - beside <= expected.keys()


@every_algorithm
def test_hyper_parameters_are_frozen_and_unknown_ones_refused(algorithm: Algorithm) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        algorithm.reduction = "token_mean"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra_forbidden"):
        type(algorithm)(no_such_thing=1)


@every_algorithm
def test_a_reduction_that_needs_a_constant_is_refused_where_there_is_none(algorithm: Algorithm) -> None:
    with pytest.raises(ValidationError, match="reduction"):
        type(algorithm)(reduction="fixed_length", fixed_length=None)


@every_algorithm
def test_every_reduction_it_offers_can_be_computed(algorithm: Algorithm) -> None:
    offered = get_args(type(algorithm).model_fields["reduction"].annotation)
    assert algorithm.reduction in offered
    for reduction in offered:
        other = type(algorithm)(reduction=reduction, fixed_length=7 if reduction == "fixed_length" else None)
        weights = other.sample_weights(toy_source().loss_mask.sum(-1))
        assert weights.shape == (12,)
        assert (weights > 0).all()


# --- the registry -----------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.name = grpo_icepopp: .* Did you mean grpo_icepop\?"):
        algorithms.build("grpo_icepopp", {})


def test_a_copied_file_cannot_take_the_name_of_the_original() -> None:
    taken = registry._algorithms["grpo_icepop"]
    copy = type(taken.__qualname__, (taken,), {"__module__": "rlhf.algorithms.copied"})
    copy.__qualname__ = taken.__qualname__
    with pytest.raises(ValueError, match=r"already registered by rlhf\.algorithms\.grpo_icepop"):
        algorithms.register("grpo_icepop")(copy)
    assert algorithms.register("grpo_icepop")(taken) is taken


@pytest.mark.parametrize(
    ("name", "wrong", "where"),
    [
        ("grpo", {"clip_low": 1.0}, "clip_low"),
        ("grpo", {"clip_high": 0.0}, "clip_high"),
        ("grpo", {"std_ddof": 2}, "std_ddof"),
        ("grpo", {"std_eps": 0.0}, "std_eps"),
        ("grpo", {"kl": {"coefficient": -0.1}}, "coefficient"),
        ("grpo", {"kl": {"coefficient": math.inf}}, "coefficient"),
        ("grpo", {"group_filter": "all_wrong"}, "group_filter"),
        ("grpo_icepop", {"correction": {"kind": "icepop", "low": 1.1}}, "low"),
        ("grpo_icepop", {"correction": {"kind": "icepop", "high": 0.9}}, "high"),
        ("grpo_icepop", {"correction": {"kind": "icepop", "cap": 2.0}}, "cap"),
        ("grpo_icepop", {"correction": {"kind": "tis_token", "cap": 0.5}}, "cap"),
        ("grpo_icepop", {"correction": {"kind": "icepopp"}}, "correction"),
        ("dapo", {"overlong_buffer_tokens": 4}, "overlong_buffer_tokens needs overlong_max_tokens"),
        ("dapo", {"overlong_max_tokens": 4, "overlong_buffer_tokens": 5}, "at most overlong_max_tokens = 4"),
        ("dr_grpo", {"fixed_length": None}, "fixed_length must be set"),
        ("agapo", {"all_incorrect": "no"}, "all_incorrect"),
        ("agapo_offpolicy", {"ratio_cap": 0.9}, "ratio_cap"),
        ("cispo", {"ratio_high": 0.0}, "ratio_high"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, wrong: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        algorithms.build(name, wrong)


def test_rows_are_what_every_batch_is() -> None:
    assert all(isinstance(batch_for(built(name)), Rows) for name in NAMES)
