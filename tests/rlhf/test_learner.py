from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlhf.algorithms import build
from rlhf.batches.packing import Share, WorkModel, plan_batch
from rlhf.batches.ragged import Sequences, SupervisedSequences, supervised_sequences
from rlhf.config import OptimizerConfig
from rlhf.errors import NonFiniteError
from rlhf.losses.logprobs import head_logprobs
from rlhf.losses.reduce import sample_weights
from rlhf.samples import TokenizedExample
from rlhf.training.learner import Learner, TrainingEngine
from rlhf.training.token_model import Pack
from tests.rlhf.naive_logprobs import logprobs_and_entropy

VOCABULARY = 7
LENGTHS = (5, 3, 6, 4, 2)


class TinyEngine:
    """One embedding whose rows are the logits of the next token."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Embedding(VOCABULARY, VOCABULARY)
        self.calls: list[str] = []
        self.packs: list[Pack] = []
        self.rates: list[float] = []
        self.grad_norm = 0.0
        self.gradient = torch.zeros(())

    def forward(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        self.packs.append(pack)
        hidden = self.states(pack)[pack.predictors]
        return head_logprobs(hidden, torch.eye(VOCABULARY), pack.targets, temperature=temperature)

    def states(self, pack: Pack) -> Tensor:
        return self.module(pack.token_ids[0])

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

    def sum_over_ranks(self, value: Tensor) -> float:
        self.calls.append("sum")
        return value.item()


def supervised(lengths: tuple[int, ...] = LENGTHS) -> SupervisedSequences:
    random = np.random.default_rng(1)
    examples = [
        TokenizedExample(random.integers(0, VOCABULARY, length, np.int32), np.arange(length) >= 1) for length in lengths
    ]
    return supervised_sequences(examples, lambda tokens: sample_weights(tokens, "token_mean"))


def cut(sequences: SupervisedSequences, *counts: int) -> Share[SupervisedSequences]:
    """The sequences in their order, in micro-batches of so many."""
    return Share(sequences, counts or (len(sequences),))


THREE = cut(supervised(), 2, 2, 1)


def learner(engine: TrainingEngine, name: str = "sft", steps: int = 4, temperature: float = 0.5) -> Learner:
    return Learner(engine, build(name, {}), OptimizerConfig(learning_rate=0.1, warmup_steps=2), steps, temperature)


def naive(module: nn.Embedding, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [S] of every trained token, sequence by sequence; zero off the mask."""
    found = []
    for start, stop in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        ids = torch.from_numpy(sequences.token_ids[start:stop]).long()
        values = logprobs_and_entropy(module(ids[:-1]), ids[1:], temperature)
        found.append(torch.stack([torch.nn.functional.pad(one, (1, 0)) for one in values]))
    logprobs, entropy = torch.cat(found, 1) * torch.from_numpy(sequences.loss_mask)
    return logprobs, entropy


# --- what the model is given ------------------------------------------------------------------------------------------


def test_a_pack_by_hand() -> None:
    ids = np.array([4, 5, 6, 1, 2, 3, 3, 9], np.int32)
    mask = np.array([0, 0, 1, 0, 1, 0, 1, 0], bool)
    pack = Pack.of(Sequences(ids, mask, np.array([0, 3, 7, 8])), torch.device("cpu"))
    assert pack.token_ids.tolist() == [ids.tolist()]
    assert pack.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert pack.layout.lengths == (3, 4, 1)
    assert pack.predictors.tolist() == [1, 3, 5]
    assert pack.targets.tolist() == [6, 2, 3]
    assert {t.dtype for t in (pack.token_ids, pack.position_ids, pack.predictors, pack.targets)} == {torch.int64}


def test_a_pack_without_sequences_has_two_tokens_and_trains_none() -> None:
    pack = Pack.of(supervised().slice(0, 0), torch.device("cpu"))
    assert pack.token_ids.shape == pack.position_ids.shape == (1, 2)
    assert pack.layout.lengths == (2,)
    assert pack.predictors.tolist() == pack.targets.tolist() == []


def test_the_model_sees_each_micro_batch_as_one_pack_without_padding() -> None:
    engine = TinyEngine()
    learner(engine).update(THREE)
    assert [pack.layout.lengths for pack in engine.packs] == [(5, 3), (6, 4), (2,)]
    assert torch.cat([pack.token_ids[0] for pack in engine.packs]).tolist() == THREE.batch.token_ids.tolist()


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1), (2, 2, 1), (3, 2), (5,), (2, 0, 3), (5, 0, 0)])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(counts: tuple[int, ...]) -> None:
    whole, split = TinyEngine(), TinyEngine()
    expected = learner(whole).update(cut(supervised()))
    found = learner(split).update(cut(supervised(), *counts))
    torch.testing.assert_close(split.gradient, whole.gradient, atol=1e-7, rtol=0)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found.metrics.result() == pytest.approx(expected.metrics.result(), abs=1e-6)
    assert found.trained_tokens == expected.trained_tokens == 15


@pytest.mark.parametrize("token_budget", [1, 8, 100])
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_a_planned_batch_gives_the_loss_of_the_whole_on_any_number_of_ranks(ranks: int, token_budget: int) -> None:
    whole = TinyEngine()
    expected = learner(whole).update(cut(supervised()))
    loss, gradient, tokens = 0.0, torch.zeros(()), 0
    for share in plan_batch(supervised(), ranks, token_budget, WorkModel()).shares(supervised()):
        engine = TinyEngine()
        report = learner(engine).update(share)
        loss, tokens = loss + report.loss, tokens + report.trained_tokens
        gradient = gradient + engine.gradient
    assert loss == pytest.approx(expected.loss, abs=1e-6)
    assert tokens == 15
    torch.testing.assert_close(gradient, whole.gradient, atol=1e-7, rtol=0)


def test_the_loss_and_the_metrics_of_every_stage_agree_with_a_naive_form() -> None:
    engine = TinyEngine()
    logprobs, entropy = naive(engine.module, supervised())
    found = learner(engine).update(THREE)
    assert found.loss == pytest.approx(-logprobs.sum().item() / 15, abs=1e-6)
    assert found.metrics.result() == pytest.approx(
        {"policy/nll_nats": -logprobs.sum().item() / 15, "policy/entropy_nats": entropy.sum().item() / 15}, abs=1e-6
    )


def test_only_the_last_backward_is_marked_and_the_loss_is_summed_over_ranks_before_the_step() -> None:
    engine = TinyEngine()
    learner(engine).update(THREE)
    assert engine.calls == ["backward", "backward", "last backward", "sum", "step"]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimiser_steps() -> None:
    engine = TinyEngine()
    with torch.no_grad():
        engine.module.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"loss = nan at optimiser step 0: must be finite\..*learning rate"):
        learner(engine).update(THREE)
    assert "step" not in engine.calls


def test_the_loss_of_another_rank_stops_this_one_too() -> None:
    engine = TinyEngine()
    engine.sum_over_ranks = lambda value: math.inf  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="loss = inf"):
        learner(engine).update(THREE)
    assert "step" not in engine.calls


def test_a_gradient_norm_that_is_not_finite_stops_the_run() -> None:
    engine = TinyEngine()
    engine.grad_norm = math.inf
    with pytest.raises(NonFiniteError, match="gradient norm = inf at optimiser step 0"):
        learner(engine).update(THREE)


def test_the_learning_rate_follows_the_schedule_of_its_own_steps() -> None:
    engine = TinyEngine()
    one = learner(engine)
    rates = [one.update(THREE).learning_rate for _ in range(3)]
    assert rates == engine.rates == pytest.approx([0.05, 0.1, 0.1])


def test_only_algorithms_with_rollouts_train_at_the_sampling_temperature() -> None:
    engine = TinyEngine()
    found = learner(engine, "sft", temperature=0.5).update(cut(supervised()))
    assert found.loss == pytest.approx(-naive(engine.module, supervised())[0].sum().item() / 15, abs=1e-6)


def test_the_losses_of_many_micro_batches_are_added_in_float64() -> None:
    """In float32 a large first part would swallow all others."""
    sequences = supervised((2,) * 101)
    sequences.weights[:] = 1.0
    sequences.weights[0] = 2.0**26
    alone = [learner(TinyEngine()).update(cut(part)).loss for part in sequences.split([1] * 101)]
    found = learner(TinyEngine()).update(cut(sequences, *[1] * 101)).loss
    assert found == sum(alone)
    assert found != float(np.sum(np.array(alone, np.float32), dtype=np.float32))


# --- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1), (2, 2, 1), (5,), (2, 0, 3)])
def test_log_probs_come_back_in_the_order_of_the_share(counts: tuple[int, ...]) -> None:
    engine, sequences = TinyEngine(), supervised()
    found = learner(engine, "grpo_icepop", temperature=0.5).logprobs(cut(sequences, *counts))
    expected = naive(engine.module, sequences, 0.5)[0].detach()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6, rtol=0)
    assert np.abs(found[~sequences.loss_mask]).sum() == 0
    assert found.dtype == np.float32
    assert engine.module.weight.grad is None


def test_log_probs_of_another_model_are_taken_on_request_and_leave_the_policy_alone() -> None:
    policy, other, sequences = TinyEngine(), TinyEngine(), supervised()
    with torch.no_grad():
        other.module.weight.mul_(2.0)
    found = learner(policy, "grpo", temperature=0.5).logprobs(THREE, other)
    np.testing.assert_allclose(found, naive(other.module, sequences, 0.5)[0].detach().numpy(), atol=1e-6, rtol=0)
    assert policy.packs == []


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_states_off_the_mask_do_not_poison_loss_gradient_or_log_probs(garbage: float) -> None:
    class Poisoned(TinyEngine):
        def states(self, pack: Pack) -> Tensor:
            unused = torch.ones(pack.token_ids.shape[1], dtype=torch.bool)
            unused[pack.predictors] = False
            # Added, not filled in: whatever gradient these states get goes on into the weights.
            return self.module(pack.token_ids[0]) + torch.where(unused, garbage, 0.0)[:, None]

    clean, poisoned = TinyEngine(), Poisoned()
    expected = learner(clean).update(THREE)
    found = learner(poisoned).update(THREE)
    assert found.loss == expected.loss
    assert torch.equal(poisoned.gradient, clean.gradient)
    assert found.metrics.result() == expected.metrics.result()
    values = learner(poisoned, "grpo_icepop").logprobs(THREE)
    assert np.array_equal(values, learner(clean, "grpo_icepop").logprobs(THREE))


def test_a_rank_without_sequences_keeps_in_step_and_adds_nothing() -> None:
    engine = TinyEngine()
    empty = Share(supervised().slice(0, 0), (0, 0, 0))
    report = learner(engine).update(empty)
    assert engine.calls == ["backward", "backward", "last backward", "sum", "step"]
    assert engine.gradient.abs().sum() == 0
    assert (report.loss, report.trained_tokens, report.metrics.result()) == (0.0, 0, {})
    assert learner(engine, "grpo_icepop").logprobs(empty).shape == (0,)
    assert len(engine.packs) == 6


def test_a_micro_batch_without_trained_tokens_keeps_in_step_and_adds_nothing() -> None:
    engine, sequences = TinyEngine(), supervised((4, 4))
    sequences.loss_mask[:] = False
    report = learner(engine).update(cut(sequences, 1, 1))
    assert engine.calls == ["backward", "last backward", "sum", "step"]
    assert engine.gradient.abs().sum() == 0
    assert (report.loss, report.trained_tokens, report.metrics.result()) == (0.0, 0, {})
    assert learner(engine, "grpo_icepop").logprobs(cut(sequences, 1, 1)).tolist() == [0.0] * 8
