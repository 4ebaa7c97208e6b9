"""Where two algorithms are one, by their papers; and batches at the edge of what a run can hand over."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import algorithms
from rlhf.algorithms import Algorithm
from rlhf.batches import TrainBatch
from rlhf.errors import NonFiniteError
from rlhf.losses.logprobs import head_logprobs
from rlhf.losses.reduce import Reduction, sample_weights
from rlhf.training.token_model import Pack
from tests.rlhf.toy_world import (
    F64,
    Batch,
    Source,
    Toy,
    ToyEngine,
    advantages_of,
    assert_same,
    batch_for,
    built,
    learner,
    loss_and_gradient,
    policy_logprobs,
    reduced,
    sequences_of,
    token_weights,
    toy_source,
    train_batch,
    whole,
)

NAMES = algorithms.names()
ONLINE = [name for name in NAMES if built(name).needs.rollouts]
every_name = pytest.mark.parametrize("name", NAMES)


def gradient_of(algorithm: Algorithm, source: Source) -> Tensor:
    """[B, T] of the reduced loss in the log-probs."""
    batch = batch_for(algorithm, source)
    logprobs = policy_logprobs(algorithm, batch).detach().requires_grad_()
    return torch.autograd.grad(reduced(algorithm, logprobs, batch), logprobs)[0]


def on_policy() -> Source:
    """The batch where engine, learner and policy agree."""
    source = toy_source()
    exact = policy_logprobs(built("grpo"), batch_for(built("grpo"), source)).detach()
    return replace(source, proximal_logprobs=exact, rollout_logprobs=exact)


def reinforced(advantages: Tensor, mask: Tensor, reduction: Reduction) -> Tensor:
    """[B, T]: the gradient of REINFORCE's loss."""
    return -advantages[:, None] * token_weights(sample_weights(mask.sum(-1), reduction, dtype=F64), mask)


# --- one algorithm under two names ------------------------------------------------------------------------------------


def test_dapo_with_equal_clips_the_sequence_mean_and_no_filter_is_grpo() -> None:
    dapo = built("dapo", clip_high=0.2, reduction="sequence_mean", group_filter="none")
    ours, grpo = loss_and_gradient(dapo, batch_for(dapo)), loss_and_gradient(built("grpo"), batch_for(built("grpo")))
    assert ours[0] == grpo[0]
    assert torch.equal(ours[1], grpo[1])
    assert dapo.model_dump(include=set(type(built("grpo")).model_fields)) == built("grpo").model_dump()


def test_grpo_with_the_correction_of_icepop_and_centred_rewards_is_grpo_icepop() -> None:
    icepop = {"kind": "icepop", "low": 0.5, "high": 5.0}
    theirs, ours = (
        built("grpo_icepop"),
        built("dr_grpo", correction=icepop, reduction="sequence_mean", fixed_length=None),
    )
    assert loss_and_gradient(ours, batch_for(ours))[0] == loss_and_gradient(theirs, batch_for(theirs))[0]


def test_rloo_on_fresh_samples_is_reinforce_on_whole_sequences_with_g_over_g_minus_1_times_the_centred_reward() -> None:
    source = on_policy()
    centred = source.rewards - source.rewards.view(3, 4).mean(1).repeat_interleave(4)
    expected = reinforced(centred * 4 / 3, source.loss_mask, "sequence_sum")
    torch.testing.assert_close(gradient_of(built("rloo"), source), expected, atol=1e-14, rtol=0)


def test_cispo_at_ratio_one_is_reinforce_with_the_token_mean() -> None:
    source = on_policy()
    expected = reinforced(advantages_of(built("grpo"), source), source.loss_mask, "token_mean")
    torch.testing.assert_close(gradient_of(built("cispo"), source), expected, atol=1e-14, rtol=0)


def test_agapo_off_policy_at_ratio_one_is_reinforce_with_the_advantages_of_agapo_and_the_sequence_mean() -> None:
    source = on_policy()
    expected = reinforced(advantages_of(built("agapo"), source), source.loss_mask, "sequence_mean")
    torch.testing.assert_close(gradient_of(built("agapo_offpolicy"), source), expected, atol=1e-14, rtol=0)


def test_agapo_without_a_kl_is_reinforce_on_whole_sequences() -> None:
    source, agapo = toy_source(), built("agapo", kl={"coefficient": 0.0})
    expected = reinforced(advantages_of(agapo, source), source.loss_mask, "sequence_sum")
    torch.testing.assert_close(gradient_of(agapo, source), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("length", [1, 7, 1024])
def test_dr_grpo_divides_by_its_constant_and_by_no_length(length: int) -> None:
    ours = gradient_of(built("dr_grpo", fixed_length=length), toy_source())
    theirs = gradient_of(built("dr_grpo", reduction="sequence_sum", fixed_length=None), toy_source())
    torch.testing.assert_close(ours, theirs / length, atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", ["gspo", "rloo"])
def test_on_completions_of_one_token_a_sequence_is_a_token(name: str) -> None:
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    source = one_token(toy_source())
    weights = sample_weights(source.loss_mask.sum(-1), "token_mean", dtype=F64)
    batch = train_batch(source, advantages_of(built(name), source), weights)
    ours, grpo = loss_and_gradient(built(name, **clip), batch), loss_and_gradient(built("grpo"), batch)
    assert ours[0] == pytest.approx(grpo[0], abs=1e-14)
    torch.testing.assert_close(ours[1], grpo[1], atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("agapo", "sequence_sum"),
        ("agapo_offpolicy", "sequence_mean"),
        ("cispo", "token_mean"),
        ("dapo", "token_mean"),
        ("dr_grpo", "fixed_length"),
        ("grpo", "sequence_mean"),
        ("grpo_icepop", "sequence_mean"),
        ("gspo", "sequence_mean"),
        ("rloo", "sequence_sum"),
        ("sft", "token_mean"),
    ],
)
def test_the_default_reduction_of_every_algorithm_by_hand(name: str, reduction: str) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]).bool()
    first, second = {
        "sequence_sum": (1 / 2, 1 / 2),
        "sequence_mean": (1 / 6, 1 / 2),
        "token_mean": (1 / 4, 1 / 4),
        "fixed_length": (1 / 14, 1 / 14),
    }[reduction]
    found = built(name).sample_weights(mask.sum(-1), F64)
    torch.testing.assert_close(found, torch.tensor([first, second], dtype=F64), atol=1e-15, rtol=0)


# --- the edge ---------------------------------------------------------------------------------------------------------


def masked(source: Source, mask: Tensor) -> Source:
    return replace(source, loss_mask=mask)


def one_token(source: Source) -> Source:
    return masked(source, source.loss_mask & (torch.arange(source.loss_mask.shape[1]) == 2))


def some_empty(source: Source) -> Source:
    """Rows 1, 4, 6 and 7 without a completion; pairs that lost one side or both."""
    empty = torch.isin(torch.arange(len(source)), torch.tensor([1, 4, 6, 7]))
    return masked(source, source.loss_mask & ~empty[:, None])


def lost_members(source: Source) -> Source:
    """Groups of four, three and one."""
    return source.rows(torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]))


def equal_rewards(source: Source) -> Source:
    return replace(source, rewards=torch.full_like(source.rewards, 0.1))


@every_name
@pytest.mark.parametrize("edge", [one_token, some_empty, lost_members, equal_rewards])
def test_batches_at_the_edge_train_finitely_and_the_same_in_every_layout(name: str, edge: Any) -> None:
    algorithm = built(name)
    batch = batch_for(algorithm, edge(toy_source()))
    trains = edge is not equal_rewards
    assert_same(algorithm, batch, batch, trains=trains, token_budget=1)
    assert_same(algorithm, batch, batch, trains=trains, token_budget=15, ranks=3)


@every_name
def test_an_empty_completion_has_no_gradient_and_leaves_the_others_theirs(name: str) -> None:
    algorithm = built(name)
    batch = batch_for(algorithm, some_empty(toy_source()))
    gradient = gradient_of(algorithm, some_empty(toy_source()))
    assert gradient.isfinite().all()
    assert gradient[~batch.loss_mask.any(-1)].abs().sum() == 0
    assert gradient[batch.loss_mask.any(-1)].abs().sum() > 0


@every_name
def test_a_step_of_empty_completions_alone_trains_nothing(name: str) -> None:
    algorithm, source = built(name), toy_source()
    batch = batch_for(algorithm, masked(source, torch.zeros_like(source.loss_mask)))
    loss, gradient = loss_and_gradient(algorithm, batch)
    assert loss == 0.0
    assert gradient.abs().sum() == 0


@pytest.mark.parametrize("name", ONLINE)
def test_a_group_that_lost_all_but_one_has_no_advantage(name: str) -> None:
    advantages = advantages_of(built(name), lost_members(toy_source()))
    assert advantages[-1] == 0.0
    assert advantages.isfinite().all()
    assert (advantages[:7] != 0).any()


def spoiled(source: Batch, table: str, value: float) -> Batch:
    """One token on the mask of row 5 with `value` in `table`."""
    values = getattr(source, table).clone()
    values[5, 4] = value
    return replace(source, **{table: values})


class Spoiled(ToyEngine):
    """Logits of one predicted position are broken: all of them, or that of the token which came."""

    value, every_logit = math.nan, True

    def forward(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        lengths = pack.layout.lengths
        longest = lengths.index(max(lengths))
        hurt = pack.predictors == sum(lengths[:longest]) + 3
        assert hurt.sum() == 1
        hidden, target = self.states(pack), pack.targets[hurt]
        spoiled = self.module.head.bias.detach().clone()
        spoiled[slice(None) if self.every_logit else target] = self.value
        logprobs, entropy = self.head(hidden, pack.targets, temperature)
        weight = self.module.head.weight
        broken, _ = head_logprobs(hidden[hurt], weight, target, bias=spoiled, temperature=temperature)
        return logprobs.masked_scatter(hurt, broken), entropy


@every_name
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_logits_on_the_mask_stop_the_run(name: str, value: float) -> None:
    assert_stops(name, value, every_logit=True)


@every_name
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_logit_of_the_token_that_came_stops_the_run(name: str, value: float) -> None:
    assert_stops(name, value, every_logit=False)


def assert_stops(name: str, value: float, *, every_logit: bool) -> None:
    broken = Spoiled(Toy())
    broken.value, broken.every_logit = value, every_logit
    before = broken.module.head.weight.clone()
    with pytest.raises(NonFiniteError, match="must be finite"):
        learner(built(name), broken, rate=1.0)[0].update(whole(sequences_of(batch_for(built(name)))))
    assert torch.equal(broken.module.head.weight, before)


def used_tables(algorithm: Algorithm, batch: Batch) -> list[str]:
    """The log-probs beside the policy's that the loss depends on."""
    logprobs = policy_logprobs(algorithm, batch).detach()
    before = algorithm.token_loss(logprobs, batch).loss[batch.loss_mask]
    names = [n for n in ("proximal_logprobs", "rollout_logprobs", "reference_logprobs") if hasattr(batch, n)]
    moved = {n: algorithm.token_loss(logprobs, replace(batch, **{n: getattr(batch, n) * 1.01})).loss for n in names}
    return [n for n, loss in moved.items() if not torch.equal(loss[batch.loss_mask], before)]


@every_name
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_log_prob_on_the_mask_stops_the_run_wherever_the_loss_uses_it(name: str, value: float) -> None:
    algorithm = built(name)
    batch = batch_for(algorithm)
    tables = used_tables(algorithm, batch)
    assert tables or algorithm.needs.data != "rollouts"
    for table in tables:
        one, engine = learner(algorithm, rate=1.0)
        before = engine.module.head.weight.clone()
        with pytest.raises(NonFiniteError, match="must be finite"):
            one.update(whole(sequences_of(spoiled(batch, table, value))))
        assert torch.equal(engine.module.head.weight, before), table


@every_name
@pytest.mark.parametrize("table", ["policy", "proximal_logprobs", "rollout_logprobs", "reference_logprobs"])
def test_a_huge_negative_log_prob_on_a_token_of_weight_zero_stays_finite(name: str, table: str) -> None:
    algorithm = built(name)
    batch = batch_for(algorithm)
    weights = batch.token_weights.clone()
    weights[5] = 0.0
    batch = replace(batch, token_weights=weights)
    logprobs = policy_logprobs(algorithm, batch).detach()
    if table == "policy":
        logprobs[5, 4] = -1e4
    elif hasattr(batch, table):
        batch = spoiled(batch, table, -1e4)
    logprobs.requires_grad_()
    loss = reduced(algorithm, logprobs, batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if not isinstance(batch, TrainBatch):
        return
    assert gradient[5].abs().sum() == 0
