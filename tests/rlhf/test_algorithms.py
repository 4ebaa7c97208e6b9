"""Laws that every algorithm obeys. A new one is covered by being registered; it must only add its naive loop."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rlhf import algorithms
from rlhf.algorithms import Algorithm, Needs, registry
from rlhf.batches import AnnotatedBatch, Rows, SupervisedBatch, TrainBatch, train_batch
from rlhf.config import OptimizerConfig
from rlhf.errors import ConfigError
from rlhf.losses.logprobs import token_logprobs
from rlhf.training.batching import deal, micro_batch_count
from rlhf.training.learner import Learner

F64 = torch.float64
VOCABULARY, TEMPERATURE = 11, 0.7
Batch = TrainBatch | SupervisedBatch

every_algorithm = pytest.mark.parametrize("algorithm", [algorithms.build(n, {}) for n in algorithms.names()], ids=type)
with_rollouts = pytest.mark.parametrize(
    "algorithm", [a for n in algorithms.names() if (a := algorithms.build(n, {})).needs.rollouts], ids=type
)


# --- a small world in float64 -----------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A causal policy: token t + 1 depends on the mean of the embeddings up to t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=F64)
        self.head = nn.Linear(6, VOCABULARY, dtype=F64)

    def forward(self, token_ids: Tensor) -> Tensor:
        position = torch.arange(1, token_ids.shape[1] + 1, dtype=F64)
        return self.head(torch.tanh(2 * self.embedding(token_ids).cumsum(1) / position[:, None]))


class ToyEngine:
    """A training engine of one rank that keeps the gradient of the last step."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def logits(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.module(token_ids)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self.gradient = torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None])
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(learning_rate * parameter.grad)
        self.module.zero_grad()
        return float(self.gradient.norm())

    def sum_over_ranks(self, value: float) -> float:
        return value


def annotated_batch(rewards: Tensor | None = None) -> AnnotatedBatch:
    """Three groups of four, of different lengths, off-policy enough that clips and masks act."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 12, 9
    lengths = torch.randint(4, width + 1, (rows,), generator=generator)
    lengths[5] = width
    position = torch.arange(width)
    mask = (position >= 2) & (position < lengths[:, None])
    token_ids = torch.randint(VOCABULARY, (rows, width), generator=generator)
    with torch.no_grad():
        exact = token_logprobs(Toy()(token_ids), token_ids, mask, temperature=TEMPERATURE)
    noise = torch.randn(2, rows, width, generator=generator, dtype=F64)
    proximal = torch.where(mask, exact + 0.3 * noise[0], 0.0)
    return AnnotatedBatch(
        token_ids=token_ids,
        lengths=lengths,
        loss_mask=mask,
        rollout_logprobs=torch.where(mask, proximal + 0.8 * noise[1], 0.0),
        rewards=torch.rand(rows, generator=generator, dtype=F64) if rewards is None else rewards,
        group_index=torch.arange(rows) // 4,
        staleness=torch.zeros(rows, dtype=torch.int64),
        proximal_logprobs=proximal,
    )


def batch_for(algorithm: Algorithm, annotated: AnnotatedBatch | None = None) -> Batch:
    """One optimiser step for `algorithm`, of whatever type it trains on."""
    source = annotated or annotated_batch()
    weights = algorithm.token_weights(source.loss_mask, F64)
    if algorithm.needs.rollouts:
        return train_batch(source, algorithm.advantages(source), weights)
    return SupervisedBatch(source.token_ids, source.lengths, source.loss_mask, weights)


def learner(algorithm: Algorithm, micro_batch_size: int = 100, rate: float = 1e-30) -> tuple[Learner, ToyEngine]:
    engine = ToyEngine(Toy())
    return Learner(engine, algorithm, OptimizerConfig(learning_rate=rate), 1, micro_batch_size, TEMPERATURE), engine


def loss_and_gradient(
    algorithm: Algorithm, batch: Batch, micro_batch_size: int = 100, ranks: int = 1
) -> tuple[float, Tensor]:
    """Summed over the ranks, as the engine of a real run does."""
    count = micro_batch_count(len(batch), ranks, micro_batch_size)
    loss, gradient = 0.0, torch.zeros(())
    for share in deal(batch.lengths, ranks):
        one, engine = learner(algorithm, micro_batch_size)
        loss += one.update(batch.rows(share), count).loss
        gradient = gradient + engine.gradient
    return loss, gradient


def assert_same(algorithm: Algorithm, batch: Batch, other: Batch, **split: int) -> None:
    loss, gradient = loss_and_gradient(algorithm, batch)
    other_loss, other_gradient = loss_and_gradient(algorithm, other, **split)
    assert gradient.norm() > 1e-3
    assert other_loss == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-12, rtol=0)


def unreduced(algorithm: Algorithm, logprobs: Tensor, batch: Batch) -> Tensor:
    loss = algorithm.token_loss(logprobs, batch).loss
    return (torch.where(batch.loss_mask, loss, torch.zeros_like(loss)) * batch.token_weights).sum()


# --- agreement with naive loops ---------------------------------------------------------------------------------------


def naive_sft(batch: Any, logprobs: list[list[float]]) -> tuple[float, dict[tuple[int, int], float]]:
    tokens = [(i, t) for i, row in enumerate(batch.loss_mask.tolist()) for t, on in enumerate(row) if on]
    loss = -sum(logprobs[i][t] for i, t in tokens) / len(tokens)
    return loss, {token: -1 / len(tokens) for token in tokens}


def naive_grpo_icepop(batch: Any, logprobs: list[list[float]]) -> tuple[float, dict[tuple[int, int], float]]:
    rewards, groups = batch.rewards.tolist(), batch.group_index.tolist()
    proximal, rollout = batch.proximal_logprobs.tolist(), batch.rollout_logprobs.tolist()
    mask = batch.loss_mask.tolist()
    loss, gradient = 0.0, {}
    for i in range(len(rewards)):
        same = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        advantage = rewards[i] - sum(same) / len(same)
        for t in [t for t, on in enumerate(mask[i]) if on]:
            weight = 1 / (len(rewards) * sum(mask[i]))
            k = math.exp(proximal[i][t] - rollout[i][t])
            k = k if 0.5 <= k <= 5.0 else 0.0
            ratio = math.exp(logprobs[i][t] - proximal[i][t])
            free, clipped = ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage
            loss -= weight * k * min(free, clipped)
            gradient[i, t] = -weight * k * ratio * advantage if free <= clipped else 0.0
    return loss, gradient


NAIVE = {"sft": naive_sft, "grpo_icepop": naive_grpo_icepop}


@pytest.mark.parametrize("name", algorithms.names())
def test_loss_and_gradient_agree_with_a_naive_float64_loop(name: str) -> None:
    assert name in NAIVE, f"write the formula of {name} as a plain loop in NAIVE"
    algorithm = algorithms.build(name, {})
    batch = batch_for(algorithm)
    temperature = TEMPERATURE if algorithm.needs.rollouts else 1.0
    with torch.no_grad():
        logprobs = token_logprobs(Toy()(batch.token_ids), batch.token_ids, batch.loss_mask, temperature=temperature)
    logprobs.requires_grad_()
    loss = unreduced(algorithm, logprobs, batch)
    loss.backward()
    naive_loss, naive_gradient = NAIVE[name](batch, logprobs.tolist())
    expected = torch.zeros_like(logprobs)
    for token, value in naive_gradient.items():
        expected[token] = value
    assert abs(loss.item() - naive_loss) < 1e-10
    assert logprobs.grad is not None
    assert (logprobs.grad - expected).abs().max() < 1e-10
    through_learner, _ = loss_and_gradient(algorithm, batch)
    assert abs(through_learner - naive_loss) < 1e-10


def test_the_batch_of_these_tests_makes_clips_and_icepop_act() -> None:
    batch = batch_for(algorithms.build("grpo_icepop", {}))
    assert isinstance(batch, TrainBatch)
    logprobs = token_logprobs(Toy()(batch.token_ids), batch.token_ids, batch.loss_mask, temperature=TEMPERATURE)
    metrics = algorithms.build("grpo_icepop", {}).token_loss(logprobs, batch).metrics
    for name in ("policy/clip_fraction", "mismatch/masked_fraction"):
        assert 0.05 < metrics[name][batch.loss_mask].mean() < 0.95


# --- laws -------------------------------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("extra", [1, 5])
def test_padding_width_and_what_padding_holds_do_not_matter(algorithm: Algorithm, extra: int) -> None:
    batch = batch_for(algorithm)

    def widened(value: Tensor) -> Tensor:
        filler = {torch.bool: 0, torch.int64: VOCABULARY - 1}.get(value.dtype, math.nan)
        return torch.nn.functional.pad(value, (0, extra), value=filler) if value.ndim == 2 else value

    wide = replace(batch, **{item.name: widened(getattr(batch, item.name)) for item in fields(batch)})
    wide = replace(wide, token_weights=algorithm.token_weights(wide.loss_mask, F64))
    assert wide.token_ids.shape[1] == batch.token_ids.shape[1] + extra
    logprobs = [token_logprobs(Toy()(b.token_ids), b.token_ids, b.loss_mask) for b in (batch, wide)]
    losses = [unreduced(algorithm, lp, b) for lp, b in zip(logprobs, (batch, wide), strict=True)]
    gradients = [torch.autograd.grad(loss, lp)[0] for loss, lp in zip(losses, logprobs, strict=True)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-14, rtol=0)
    inside = batch.loss_mask
    width = batch.token_ids.shape[1]
    torch.testing.assert_close(gradients[1][:, :width][inside], gradients[0][inside], atol=1e-14, rtol=0)
    assert_same(algorithm, batch, wide)


@every_algorithm
def test_what_prompt_and_padding_positions_hold_does_not_matter(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    floats = {item.name: getattr(batch, item.name) for item in fields(batch) if item.name != "token_weights"}
    dirty = {n: v.masked_fill(~batch.loss_mask, math.nan) for n, v in floats.items() if v.dtype == F64 and v.ndim == 2}
    position = torch.arange(batch.token_ids.shape[1])
    ids = batch.token_ids.masked_fill(position >= batch.lengths[:, None], 0)
    assert_same(algorithm, batch, replace(batch, **dirty, token_ids=ids))


@every_algorithm
def test_row_order_does_not_matter(algorithm: Algorithm) -> None:
    source = annotated_batch()
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(1))
    assert_same(algorithm, batch_for(algorithm, source), batch_for(algorithm, source.rows(order)))


@every_algorithm
@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_the_split_into_micro_batches_does_not_matter(algorithm: Algorithm, micro_batch_size: int) -> None:
    batch = batch_for(algorithm)
    assert_same(algorithm, batch, batch, micro_batch_size=micro_batch_size)


@every_algorithm
@pytest.mark.parametrize("ranks", [2, 5, 13])
def test_the_split_over_ranks_does_not_matter(algorithm: Algorithm, ranks: int) -> None:
    batch = batch_for(algorithm)
    assert_same(algorithm, batch, batch, ranks=ranks, micro_batch_size=2)


@every_algorithm
def test_no_gradient_off_the_loss_mask(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    logits = Toy()(batch.token_ids).detach().requires_grad_()
    one, engine = learner(algorithm)
    engine.module = nn.ParameterList([nn.Parameter(logits)])
    engine.logits = lambda token_ids, lengths: engine.module[0]  # type: ignore[method-assign]
    order = torch.argsort(batch.lengths, descending=True, stable=True)
    one.update(batch.rows(order), 1)
    gradient = engine.gradient.view_as(logits)
    predicts = torch.zeros_like(batch.loss_mask)
    predicts[:, :-1] = batch.loss_mask[order][:, 1:]
    assert gradient[~predicts].abs().sum() == 0
    assert (gradient[predicts].abs().sum(-1) > 0).float().mean() > 0.3


@every_algorithm
def test_gradient_flows_into_the_policy_alone(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    floats = {i.name: v.clone().requires_grad_() for i in fields(batch) if (v := getattr(batch, i.name)).dtype == F64}
    weights = floats.pop("token_weights").detach()
    logprobs = torch.full(batch.token_ids.shape, -1.0, dtype=F64, requires_grad=True)
    unreduced(algorithm, logprobs, replace(batch, **floats, token_weights=weights)).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().sum() > 0
    assert all(value.grad is None for value in floats.values())


@with_rollouts
def test_at_ratio_one_the_gradient_is_that_of_reinforce(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    assert isinstance(batch, TrainBatch)
    logprobs = (-torch.rand(batch.token_ids.shape, dtype=F64)).requires_grad_()
    same = logprobs.detach()
    unreduced(algorithm, logprobs, replace(batch, proximal_logprobs=same, rollout_logprobs=same)).backward()
    torch.testing.assert_close(logprobs.grad, -batch.advantages[:, None] * batch.token_weights, atol=1e-14, rtol=0)


@every_algorithm
def test_one_sgd_step_raises_the_log_prob_of_what_has_a_positive_advantage(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm).rows(torch.tensor([5]))
    if isinstance(batch, TrainBatch):
        with torch.no_grad():
            exact = token_logprobs(Toy()(batch.token_ids), batch.token_ids, batch.loss_mask, temperature=TEMPERATURE)
        batch = replace(batch, advantages=torch.ones(1, dtype=F64), proximal_logprobs=exact, rollout_logprobs=exact)
    one, engine = learner(algorithm, rate=1e-2)

    def completion_logprob() -> float:
        values = token_logprobs(engine.module(batch.token_ids), batch.token_ids, batch.loss_mask)
        return values.sum().item()

    before = completion_logprob()
    one.update(batch, 1)
    assert completion_logprob() > before


@with_rollouts
def test_identical_rewards_give_exactly_zero_advantage_and_no_gradient(algorithm: Algorithm) -> None:
    if not algorithm.needs.group_baseline:
        pytest.skip("without a baseline equal rewards do train")
    batch = batch_for(algorithm, annotated_batch(torch.full((12,), 0.1, dtype=F64)))
    assert isinstance(batch, TrainBatch)
    assert batch.advantages.tolist() == [0.0] * 12
    _, gradient = loss_and_gradient(algorithm, batch)
    assert gradient.abs().sum() == 0


@every_algorithm
def test_every_token_metric_is_aligned_with_the_tokens_and_detached(algorithm: Algorithm) -> None:
    batch = batch_for(algorithm)
    logprobs = torch.full(batch.token_ids.shape, -1.0, dtype=F64, requires_grad=True)
    for values in algorithm.token_loss(logprobs, batch).metrics.values():
        assert values.shape == batch.token_ids.shape
        assert not values.requires_grad


@every_algorithm
def test_hyper_parameters_are_frozen_and_unknown_ones_refused(algorithm: Algorithm) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        algorithm.reduction = "token_mean"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra_forbidden"):
        type(algorithm)(no_such_thing=1)


@every_algorithm
def test_a_reduction_that_needs_a_constant_is_refused_where_there_is_none(algorithm: Algorithm) -> None:
    if "fixed_length" in type(algorithm).model_fields:
        pytest.skip("it has the constant")
    with pytest.raises(ValidationError, match="reduction"):
        type(algorithm)(reduction="fixed_length")


@every_algorithm
@pytest.mark.parametrize("reduction", ["sequence_sum", "sequence_mean", "token_mean"])
def test_every_reduction_it_offers_can_be_computed(algorithm: Algorithm, reduction: str) -> None:
    other = type(algorithm)(reduction=reduction)
    assert other.token_weights(annotated_batch().loss_mask).sum() > 0


# --- the registry -----------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.name = grpo_icepopp: .* Did you mean grpo_icepop\?"):
        algorithms.build("grpo_icepopp", {})


def test_a_copied_file_cannot_take_the_name_of_the_original() -> None:
    taken = registry._algorithms["grpo_icepop"]
    copy = type(taken.__qualname__, (taken,), {"__module__": "rlhf.algorithms.copied", "needs": Needs()})
    copy.__qualname__ = taken.__qualname__
    with pytest.raises(ValueError, match=r"already registered by rlhf\.algorithms\.grpo_icepop"):
        algorithms.register("grpo_icepop")(copy)
    assert algorithms.register("grpo_icepop")(taken) is taken


def test_an_algorithm_that_trains_without_rewards_has_no_advantages() -> None:
    with pytest.raises(TypeError, match="Sft trains without rewards"):
        algorithms.build("sft", {}).advantages(annotated_batch())


@pytest.mark.parametrize("wrong", [{"clip_low": 1.0}, {"clip_high": 0.0}, {"icepop_low": 1.1}, {"icepop_high": 0.9}])
def test_bounds_of_grpo_icepop_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        algorithms.build("grpo_icepop", wrong)


def test_rows_are_what_every_batch_is() -> None:
    assert all(isinstance(batch_for(algorithms.build(name, {})), Rows) for name in algorithms.names())
