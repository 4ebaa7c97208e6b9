"""A rollout step on one rank: annotated once, then updated; the proximal log-probs that are not computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf import algorithms
from rlhf.batches.packing import Share
from rlhf.batches.ragged import NO_TOKENS, RolloutSequences, TrainSequences
from rlhf.training.learner import OnlineLearner, RankReport
from rlhf.training.token_model import Pack
from rlhf.training.worker import _sample_sums
from tests.rlhf.naive_logprobs import token_logprobs
from tests.rlhf.toy_world import (
    TEMPERATURE,
    Source,
    Toy,
    ToyEngine,
    advantages_of,
    batch_for,
    built,
    learner,
    sequences_of,
    toy_source,
)

ONLINE = [name for name in algorithms.names() if built(name).needs.rollouts]
KL_IN_REWARD = {"coefficient": 0.3, "estimator": "k1", "placement": "reward"}
KL_IN_LOSS = {"coefficient": 0.3, "estimator": "k3", "placement": "loss"}
COUNTS = (5, 0, 4, 3)
"""Micro-batches of the twelve samples, as a plan may leave them."""


def train_step(name: str, source: Source | None = None) -> TrainSequences:
    sequences = sequences_of(batch_for(built(name), source))
    assert isinstance(sequences, TrainSequences)
    return sequences


def rollouts(sequences: TrainSequences) -> RolloutSequences:
    """What arrives from the engines, in the float32 that they send."""
    return RolloutSequences(
        token_ids=sequences.token_ids,
        loss_mask=sequences.loss_mask,
        offsets=sequences.offsets,
        rollout_logprobs=sequences.rollout_logprobs.astype(np.float32),
        sample_index=sequences.sample_index,
        staleness=sequences.staleness,
    )


def dealt(counts: tuple[int, ...] = COUNTS) -> Share[RolloutSequences]:
    return Share(rollouts(train_step("grpo")), counts)


def online(
    name: str = "grpo", reference: ToyEngine | None = None, rate: float = 1e-2, **settings: object
) -> OnlineLearner:
    one, _ = learner(built(name, **settings), rate=rate)
    return OnlineLearner(one, reference)


def engine_of(online_learner: OnlineLearner) -> ToyEngine:
    engine = online_learner._learner.engine
    assert isinstance(engine, ToyEngine)
    return engine


def other_model() -> ToyEngine:
    """Weights that the policy does not have."""
    engine = ToyEngine(Toy())
    with torch.no_grad():
        engine.module.head.weight.mul_(0.5)
    return engine


def naive(module: Toy, sequences: RolloutSequences) -> np.ndarray:
    """Log-probs [S] at the sampling temperature, sequence by sequence, zero off the mask."""
    found = []
    for ids in sequences.per_sequence(sequences.token_ids):
        row = torch.from_numpy(ids).long()[None]
        found.append(token_logprobs(module(row), row, temperature=TEMPERATURE)[0].detach().numpy())
    return np.concatenate(found) * sequences.loss_mask


# --- one update: no proximal log-probs --------------------------------------------------------------------------------


def update_of(
    name: str, sequences: TrainSequences, dtype: torch.dtype, counts: tuple[int, ...]
) -> tuple[RankReport, torch.Tensor]:
    engine = ToyEngine(Toy().to(dtype))
    report = learner(built(name), engine)[0].update(Share(sequences, counts))
    return report, engine.gradient


def own_logprobs(name: str, sequences: TrainSequences, dtype: torch.dtype, counts: tuple[int, ...]) -> np.ndarray:
    """What the policy says before the update, [S] in `dtype`."""
    engine = ToyEngine(Toy().to(dtype))
    out = np.zeros(len(sequences.token_ids), np.float32 if dtype == torch.float32 else np.float64)
    parts = Share(sequences, counts).micro_batches()
    with torch.no_grad():
        found = [engine.forward(Pack.of(part, engine.device), TEMPERATURE)[0] for part in parts]
    out[sequences.loss_mask] = torch.cat(found).numpy()
    return out


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [(12,), COUNTS])
def test_one_update_without_proximal_log_probs_is_bit_equal_to_one_with_the_policy_s_own(
    name: str, dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    sequences = train_step(name)
    if dtype == torch.float32:
        floats = {"rollout_logprobs", "reference_logprobs", "advantages", "weights"}
        sequences = replace(sequences, **{n: getattr(sequences, n).astype(np.float32) for n in floats})
    explicit = replace(sequences, proximal_logprobs=own_logprobs(name, sequences, dtype, counts))
    omitted = replace(sequences, proximal_logprobs=NO_TOKENS)
    report, gradient = update_of(name, explicit, dtype, counts)
    found, found_gradient = update_of(name, omitted, dtype, counts)
    assert found.loss == report.loss
    assert torch.equal(found_gradient, gradient)
    assert gradient.dtype == dtype
    assert gradient.norm() > 1e-3
    assert found.metrics.result() == report.metrics.result()


@pytest.mark.parametrize("name", ONLINE)
def test_a_rollout_step_of_one_update_is_bit_equal_to_one_with_computed_proximal_log_probs(name: str) -> None:
    """Through hold and the float32 log-probs that the learner itself computes."""
    share = dealt()
    given = train_step(name)
    advantages, weights = given.advantages.astype(np.float32), given.weights.astype(np.float32)
    reports, gradients = [], []
    for computed in (False, True):
        engine = ToyEngine(Toy().float())
        one = OnlineLearner(learner(built(name), engine)[0], other_model_float())
        one.hold([share])
        if computed:
            proximal = one._learner.logprobs(share)
            one._held = [Share(replace(one.held(0), proximal_logprobs=proximal), share.counts)]
        reports.append(one.update(0, advantages, weights))
        gradients.append(engine.gradient)
    assert reports[0].loss == reports[1].loss
    assert torch.equal(*gradients)
    assert reports[0].metrics.result() == reports[1].metrics.result()
    assert gradients[0].norm() > 1e-3


def other_model_float() -> ToyEngine:
    engine = other_model()
    engine.module.float()
    return engine


# --- how often the policy runs ----------------------------------------------------------------------------------------


def test_one_update_needs_no_forward_pass_beside_its_own() -> None:
    one = online()
    assert one.hold([dealt()])[0].tolist() == [0.0] * 12
    assert engine_of(one).forwards == 0
    one.update(0, np.ones(12, np.float32), np.ones(12, np.float32))
    assert engine_of(one).forwards == len(COUNTS)


def test_of_several_updates_the_proximal_log_probs_are_computed_once_before_the_first() -> None:
    one = online()
    whole = rollouts(train_step("grpo"))
    shares = [Share(whole.slice(0, 4), (2, 2)), Share(whole.slice(4, 9), (5,)), Share(whole.slice(9, 12), (3,))]
    before = naive(engine_of(one).module, whole)
    one.hold(shares)
    assert engine_of(one).forwards == 4
    for number, share in enumerate(shares):
        count = len(share.batch)
        one.update(number, np.full(count, 5.0, np.float32), np.ones(count, np.float32))
    assert engine_of(one).forwards == 8
    held = np.concatenate([one.held(number).proximal_logprobs for number in range(3)])
    np.testing.assert_allclose(held, before, atol=1e-6, rtol=0)
    # The policy did move, so that its own would not have done.
    assert np.abs(naive(engine_of(one).module, whole) - before).max() > 0.1


def test_a_later_update_is_measured_against_the_weights_at_the_start_of_the_step() -> None:
    one = online(rate=0.5)
    whole = rollouts(train_step("grpo"))
    before = naive(engine_of(one).module, whole.slice(4, 12))
    one.hold([Share(whole.slice(0, 4), (4,)), Share(whole.slice(4, 12), (8,))])
    first = one.update(0, np.ones(4, np.float32), np.ones(4, np.float32)).metrics.result()
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    moved = naive(engine_of(one).module, whole.slice(4, 12))
    ratios = np.exp(moved - before)[whole.slice(4, 12).loss_mask]
    second = one.update(1, np.ones(8, np.float32), np.ones(8, np.float32)).metrics.result()
    assert second["policy/ratio"] == pytest.approx(ratios.mean(), rel=1e-5)
    assert second["policy/ratio_max"] == pytest.approx(ratios.max(), rel=1e-5)
    assert ratios.max() > 1.01


# --- reference and KL -------------------------------------------------------------------------------------------------


def test_the_reference_model_is_asked_once_for_each_micro_batch_and_kept() -> None:
    reference = other_model()
    one = online("grpo", reference, kl=KL_IN_LOSS)
    share = dealt()
    assert one.hold([share])[0].tolist() == [0.0] * 12
    assert (reference.forwards, engine_of(one).forwards) == (len(COUNTS), 0)
    wanted = naive(reference.module, share.batch)
    np.testing.assert_allclose(one.held(0).reference_logprobs, wanted, atol=1e-6, rtol=0)


def test_without_a_reference_model_there_are_no_reference_log_probs() -> None:
    one = online()
    one.hold([dealt()])
    assert one.held(0).reference_logprobs.shape == one.held(0).proximal_logprobs.shape == (0,)


def test_a_kl_in_the_reward_is_that_of_a_plain_loop_and_needs_the_policy_before_its_update() -> None:
    reference, share = other_model(), dealt()
    one = online("rloo", reference, kl=KL_IN_REWARD)
    (found,) = one.hold([share])
    assert (reference.forwards, engine_of(one).forwards) == (len(COUNTS), len(COUNTS))
    policy, frozen = naive(engine_of(one).module, share.batch), naive(reference.module, share.batch)
    offsets, mask = share.batch.offsets.tolist(), share.batch.loss_mask
    expected = [sum(policy[t] - frozen[t] for t in range(offsets[n], offsets[n + 1]) if mask[t]) for n in range(12)]
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert np.abs(found).max() > 0.1


def test_the_kl_of_several_updates_comes_by_update_and_sequence() -> None:
    whole, reference = dealt().batch, other_model()
    (together,) = online("rloo", reference, kl=KL_IN_REWARD).hold([Share(whole, (12,))])
    parts = [Share(whole.slice(0, 7), (7,)), Share(whole.slice(7, 12), (2, 3))]
    found = online("rloo", reference, kl=KL_IN_REWARD).hold(parts)
    assert [len(values) for values in found] == [7, 5]
    np.testing.assert_allclose(np.concatenate(found), together, atol=1e-6, rtol=0)


def test_a_kl_that_is_not_in_the_reward_is_not_computed() -> None:
    one = online("grpo", other_model(), kl=KL_IN_LOSS)
    assert one.hold([dealt()])[0].tolist() == [0.0] * 12


def test_the_kl_of_ranks_and_updates_is_added_up_by_sample() -> None:
    """Sample 2 has sequences on both ranks and in both updates, sample 3 has none."""
    owners = [[np.array([2, 0]), np.array([2])], [np.array([1]), np.array([4, 2])]]  # update, then rank
    values = [[np.array([1.0, 2.0]), np.array([4.0])], [np.array([8.0]), np.array([16.0, 32.0])]]  # rank, then update
    found = _sample_sums(owners, values, 5)
    assert found.tolist() == [2.0, 4.0, 1.0 + 8.0 + 32.0, 0.0, 16.0]
    assert found.dtype == torch.float32


def test_a_rank_without_sequences_holds_and_updates_in_step_with_the_others() -> None:
    reference = other_model()
    one = online("rloo", reference, kl=KL_IN_REWARD)
    empty = Share(dealt().batch.slice(0, 0), (0, 0))
    assert one.hold([empty])[0].shape == (0,)
    assert (reference.forwards, engine_of(one).forwards) == (2, 2)
    report = one.update(0, np.zeros(0, np.float32), np.zeros(0, np.float32))
    assert (report.loss, report.trained_tokens, report.metrics.result()) == (0.0, 0, {})


# --- what a held step trains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONLINE)
def test_a_held_step_trains_with_the_advantages_and_weights_that_it_is_told(name: str) -> None:
    algorithm, source = built(name), toy_source()
    given = train_step(name)
    one = OnlineLearner(learner(algorithm)[0], other_model())
    one.hold([dealt()])
    advantages = advantages_of(algorithm, source).float().numpy()
    report = one.update(0, advantages, given.weights.astype(np.float32))
    held = replace(one.held(0), advantages=advantages, weights=given.weights.astype(np.float32))
    other, engine = learner(algorithm)
    assert other.update(Share(held, COUNTS)).loss == report.loss
    assert torch.equal(engine.gradient, engine_of(one).gradient)
    assert report.trained_tokens == int(source.loss_mask.sum())


def test_holding_the_next_step_lets_go_of_the_last() -> None:
    one = online()
    one.hold([dealt(), dealt()])
    one.hold([dealt((6, 6))])
    assert len(one._held) == 1
    assert one.held(0).sample_index.tolist() == list(range(12))


def test_online_metrics_tell_the_gap_of_engine_and_learner() -> None:
    one, share = online(), dealt()
    gap = (share.batch.rollout_logprobs - naive(engine_of(one).module, share.batch))[share.batch.loss_mask]
    one.hold([share])
    found = one.update(0, np.ones(12, np.float32), np.ones(12, np.float32)).metrics.result()
    assert found["mismatch/kl_nats"] == pytest.approx(gap.mean(), abs=1e-6)
    assert found["mismatch/abs_gap_nats"] == pytest.approx(np.abs(gap).mean(), abs=1e-6)
    assert found["mismatch/abs_gap_nats_max"] == pytest.approx(np.abs(gap).max(), abs=1e-6)
