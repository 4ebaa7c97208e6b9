from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses.correction import icepop
from rlhf.losses.logprobs import token_entropy, token_logprobs
from rlhf.losses.policy import clipped, clipped_surrogate

F64 = torch.float64


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=F64)


# --- IcePop -----------------------------------------------------------------------------------------------------------


def test_icepop_keeps_ratios_inside_its_band_and_masks_those_outside() -> None:
    # exp(log(.5)) can miss .5 by one bit, so the bounds are tested on ratios that float64 holds exactly.
    ratios = row(0.49, 0.5, 1.0, 5.0, 5.01)
    found = icepop(ratios.log(), row(0, 0, 0, 0, 0), low=0.5, high=float(ratios.log().exp()[0, 3]))
    torch.testing.assert_close(found, row(0, 0.5, 1, 5, 0), atol=1e-12, rtol=0)


def test_icepop_divides_learner_by_engine() -> None:
    found = icepop(row(-1.0), row(-1.5), low=0.5, high=5.0)
    assert found.item() == pytest.approx(math.exp(0.5), abs=1e-15)


def test_icepop_carries_no_gradient() -> None:
    proximal, rollout = row(-1.0).requires_grad_(), row(-1.5).requires_grad_()
    assert not icepop(proximal, rollout, low=0.5, high=5.0).requires_grad


@pytest.mark.parametrize(("proximal", "rollout"), [(math.nan, -1.0), (-1.0, math.nan), (-math.inf, -math.inf)])
def test_a_broken_log_prob_does_not_pass_for_a_masked_token(proximal: float, rollout: float) -> None:
    assert icepop(row(proximal), row(rollout), low=0.5, high=5.0).isnan().all()


def test_a_ratio_too_large_for_a_float_is_masked() -> None:
    assert icepop(row(0.0), row(-2000.0), low=0.5, high=5.0).item() == 0.0


# --- clipped surrogate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: REINFORCE
        (1.1, 2.0, -2.2, -2.2),  # inside the band: -ratio * A
        (1.5, 2.0, -2.4, 0.0),  # too likely already: clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # less likely than it should be: never clipped
        (1.5, -2.0, 3.0, 3.0),  # more likely than it should be: never clipped
        (0.5, -2.0, 1.4, 0.0),  # unlikely enough: clipped at 0.7
        (0.8, -2.0, 1.6, 1.6),
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprobs = row(math.log(ratio) - 0.3).requires_grad_()
    clip = {"clip_low": 0.3, "clip_high": 0.2}
    found = clipped_surrogate(logprobs, row(-0.3), torch.tensor([advantage], dtype=F64), **clip)
    found.sum().backward()
    assert logprobs.grad is not None
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)
    was_clipped = clipped(logprobs.detach(), row(-0.3), torch.tensor([advantage], dtype=F64), **clip)
    assert bool(was_clipped) == (gradient == 0.0 and advantage != 0.0)


def test_the_surrogate_sends_gradient_to_the_policy_alone() -> None:
    inputs = [row(-0.5, -0.7).requires_grad_(), row(-0.6, -0.6).requires_grad_()]
    advantages = torch.tensor([1.5], dtype=F64, requires_grad=True)
    clipped_surrogate(*inputs, advantages, clip_low=0.2, clip_high=0.2).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is None
    assert advantages.grad is None


def test_an_advantage_can_be_given_for_each_token() -> None:
    logprobs = row(-1.0, -2.0)
    found = clipped_surrogate(logprobs, logprobs, row(1.0, -3.0), clip_low=0.2, clip_high=0.2)
    assert found.tolist() == [[-1.0, 3.0]]


# --- log-probs and entropy --------------------------------------------------------------------------------------------


def naive_logprobs(logits: Tensor, token_ids: Tensor, temperature: float) -> list[list[float]]:
    out = []
    for b in range(token_ids.shape[0]):
        values = [0.0]
        for t in range(1, token_ids.shape[1]):
            scaled = [x / temperature for x in logits[b, t - 1].tolist()]
            top = max(scaled)
            norm = top + math.log(sum(math.exp(x - top) for x in scaled))
            values.append(scaled[int(token_ids[b, t])] - norm)
        out.append(values)
    return out


@given(seed=st.integers(0, 2**20), temperature=st.floats(0.1, 4.0))
def test_log_probs_agree_with_a_naive_loop(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 4, 6, generator=generator, dtype=F64)
    token_ids = torch.randint(6, (2, 4), generator=generator)
    found = token_logprobs(logits, token_ids, temperature=temperature)
    naive = torch.tensor(naive_logprobs(logits, token_ids, temperature), dtype=F64)
    torch.testing.assert_close(found, naive, atol=1e-12, rtol=0)


def test_the_first_token_has_log_prob_and_entropy_zero() -> None:
    logits, token_ids = torch.randn(3, 5, 7), torch.zeros(3, 5, dtype=torch.int64)
    assert token_logprobs(logits, token_ids)[:, 0].tolist() == [0.0] * 3
    assert token_entropy(logits, token_ids)[:, 0].tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("taken", "returned"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)], ids=str
)
def test_log_probs_are_float32_or_wider(taken: torch.dtype, returned: torch.dtype) -> None:
    logits = torch.randn(1, 3, 4, dtype=taken)
    assert token_logprobs(logits, torch.zeros(1, 3, dtype=torch.int64)).dtype == returned


def test_off_the_mask_logits_reach_neither_a_value_nor_a_gradient() -> None:
    token_ids = torch.tensor([[1, 2, 3, 0], [1, 1, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    clean = torch.randn(2, 4, 5, dtype=F64)
    wanted = torch.where(mask, token_logprobs(clean, token_ids), 0.0)
    dirty = clean.clone()
    dirty[0, 0], dirty[0, 3], dirty[1, 1], dirty[1, 2] = math.nan, math.inf, -math.inf, math.nan
    dirty.requires_grad_()
    found = token_logprobs(dirty, token_ids, mask)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)
    found.sum().backward()
    assert dirty.grad is not None
    used = torch.zeros(2, 4, dtype=torch.bool)
    used[:, :-1] = mask[:, 1:]
    assert dirty.grad[~used].abs().sum() == 0
    assert dirty.grad[used].isfinite().all()
    assert token_entropy(dirty, token_ids, mask).isfinite().all()


def test_an_empty_mask_still_connects_the_logits_so_that_collectives_stay_paired() -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    token_logprobs(logits, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_the_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary() -> None:
    found = token_entropy(torch.zeros(1, 3, 8, dtype=F64), torch.zeros(1, 3, dtype=torch.int64))
    torch.testing.assert_close(found, row(0, math.log(8), math.log(8)), atol=1e-14, rtol=0)


def test_impossible_tokens_add_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]]], dtype=F64)
    assert token_entropy(logits, torch.zeros(1, 2, dtype=torch.int64)).tolist() == [[0.0, pytest.approx(math.log(2))]]


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match token_ids"):
        token_logprobs(torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.int64))
