from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rlhf.algorithms import build
from rlhf.batches import RolloutBatch, SupervisedBatch
from rlhf.config import OptimizerConfig
from rlhf.errors import NonFiniteError
from rlhf.losses.logprobs import token_logprobs
from rlhf.losses.reduce import token_weights
from rlhf.training.learner import Learner, TrainingEngine

VOCABULARY = 7


class TinyEngine:
    """One embedding whose rows are the logits of the next token."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Embedding(VOCABULARY, VOCABULARY)
        self.calls: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.rates: list[float] = []
        self.grad_norm = 0.0
        self.gradient = torch.zeros(())

    def logits(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        self.shapes.append(tuple(token_ids.shape))
        return self.module(token_ids)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.calls.append("last backward" if last else "backward")
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self.calls.append("step")
        self.rates.append(learning_rate)
        assert self.module.weight.grad is not None
        self.gradient = self.module.weight.grad.clone()
        self.module.zero_grad()
        return self.grad_norm or float(self.gradient.norm())

    def sum_over_ranks(self, value: float) -> float:
        self.calls.append("sum")
        return value


def supervised(lengths: tuple[int, ...] = (5, 3, 6, 4, 2)) -> SupervisedBatch:
    position = torch.arange(max(lengths))
    mask = (position >= 1) & (position < torch.tensor(lengths)[:, None])
    ids = torch.randint(VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(1))
    return SupervisedBatch(ids, torch.tensor(lengths), mask, token_weights(mask, "token_mean"))


def learner(
    engine: TrainingEngine, name: str = "sft", micro_batch_size: int = 2, steps: int = 4, temperature: float = 0.5
) -> Learner:
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=2)
    return Learner(engine, build(name, {}), optimizer, steps, micro_batch_size, temperature)


def rollouts(batch: SupervisedBatch) -> RolloutBatch:
    rows = len(batch)
    return RolloutBatch(
        batch.token_ids,
        batch.lengths,
        batch.loss_mask,
        torch.zeros(batch.token_ids.shape),
        torch.zeros(rows),
        torch.zeros(rows, dtype=torch.bool),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
    )


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 3), (3, 2), (5, 1), (2, 6)])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch_size(size: int, count: int) -> None:
    whole, split = TinyEngine(), TinyEngine()
    expected = learner(whole, micro_batch_size=5).update(supervised(), 1)
    found = learner(split, micro_batch_size=size).update(supervised(), count)
    torch.testing.assert_close(split.gradient, whole.gradient, atol=1e-7, rtol=0)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found.metrics.result() == pytest.approx(expected.metrics.result(), abs=1e-6)
    assert found.trained_tokens == expected.trained_tokens == 15


def test_only_the_last_backward_is_marked_and_the_loss_is_summed_over_ranks_before_the_step() -> None:
    engine = TinyEngine()
    learner(engine).update(supervised(), 3)
    assert engine.calls == ["backward", "backward", "last backward", "sum", "step"]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimiser_steps() -> None:
    engine = TinyEngine()
    with torch.no_grad():
        engine.module.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"loss = nan at optimiser step 0: must be finite\..*learning rate"):
        learner(engine).update(supervised(), 3)
    assert "step" not in engine.calls


def test_the_loss_of_another_rank_stops_this_one_too() -> None:
    engine = TinyEngine()
    engine.sum_over_ranks = lambda value: math.inf  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="loss = inf"):
        learner(engine).update(supervised(), 3)
    assert "step" not in engine.calls


def test_a_gradient_norm_that_is_not_finite_stops_the_run() -> None:
    engine = TinyEngine()
    engine.grad_norm = math.inf
    with pytest.raises(NonFiniteError, match="gradient norm = inf at optimiser step 0"):
        learner(engine).update(supervised(), 3)


def test_the_learning_rate_follows_the_schedule_of_its_own_steps() -> None:
    engine = TinyEngine()
    one = learner(engine)
    rates = [one.update(supervised(), 3).learning_rate for _ in range(3)]
    assert rates == engine.rates == pytest.approx([0.05, 0.1, 0.1])


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 3), (5, 1), (2, 4)])
def test_log_probs_come_back_in_the_order_of_the_batch(size: int, count: int) -> None:
    engine, batch = TinyEngine(), rollouts(supervised())
    found = learner(engine, "grpo_icepop", size, temperature=0.5).logprobs(batch, count)
    expected = token_logprobs(engine.module(batch.token_ids), batch.token_ids, batch.loss_mask, temperature=0.5)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert found[~batch.loss_mask].abs().sum() == 0
    assert not found.requires_grad


def test_log_probs_of_another_model_are_taken_on_request_and_leave_the_policy_alone() -> None:
    policy, other, batch = TinyEngine(), TinyEngine(), rollouts(supervised())
    with torch.no_grad():
        other.module.weight.mul_(2.0)
    found = learner(policy, "grpo", 2, temperature=0.5).logprobs(batch, 3, other)
    expected = token_logprobs(other.module(batch.token_ids), batch.token_ids, batch.loss_mask, temperature=0.5)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert policy.shapes == []


def test_only_algorithms_with_rollouts_train_at_the_sampling_temperature() -> None:
    engine, batch = TinyEngine(), supervised()
    found = learner(engine, "sft", 5, temperature=0.5).update(batch, 1)
    logprobs = token_logprobs(engine.module(batch.token_ids), batch.token_ids, batch.loss_mask)
    assert found.loss == pytest.approx(-logprobs.sum().item() / 15, abs=1e-6)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_logits_off_the_mask_do_not_poison_loss_gradient_or_log_probs(garbage: float) -> None:
    batch = supervised()
    unused = torch.zeros_like(batch.loss_mask)
    unused[:, :-1] = ~batch.loss_mask[:, 1:]
    unused[:, -1] = True

    class Poisoned(TinyEngine):
        def logits(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
            order = torch.argsort(batch.lengths, descending=True, stable=True)
            # Added, not filled in: whatever gradient these logits get goes on into the weights.
            return self.module(token_ids) + torch.where(unused[order], garbage, 0.0)[:, :, None]

    clean, poisoned = TinyEngine(), Poisoned()
    expected = learner(clean, micro_batch_size=5).update(batch, 1)
    found = learner(poisoned, micro_batch_size=5).update(batch, 1)
    assert found.loss == expected.loss
    assert torch.equal(poisoned.gradient, clean.gradient)
    assert found.metrics.result() == expected.metrics.result()
    values = learner(poisoned, "grpo_icepop", 5).logprobs(rollouts(batch), 1)
    assert torch.equal(values, learner(clean, "grpo_icepop", 5).logprobs(rollouts(batch), 1))


def test_a_rank_without_rows_keeps_in_step_and_adds_nothing() -> None:
    engine = TinyEngine()
    empty = supervised().rows(torch.tensor([], dtype=torch.int64))
    report = learner(engine).update(empty, 3)
    assert engine.calls == ["backward", "backward", "last backward", "sum", "step"]
    assert engine.gradient.abs().sum() == 0
    assert (report.loss, report.trained_tokens, report.metrics.result()) == (0.0, 0, {})
    assert learner(engine, "grpo_icepop").logprobs(rollouts(empty), 2).shape == (0, 1)


def test_padding_tokens_that_the_policy_could_sample_do_not_count() -> None:
    batch, other, engine = supervised(), supervised(), [TinyEngine(), TinyEngine()]
    ids = other.token_ids.masked_fill(torch.arange(6) >= other.lengths[:, None], 3)
    learner(engine[0]).update(batch, 3)
    learner(engine[1]).update(replace(other, token_ids=ids), 3)
    assert torch.equal(engine[0].gradient, engine[1].gradient)
