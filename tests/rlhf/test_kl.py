"""KL estimators, token by token and over whole sequences, the latter by enumerating a policy of two steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses.kl import k1, k2, k3, k3_weighted, kl_to_go
from rlhf.losses.sequence import masked_mean, masked_sum

F64 = torch.float64
NAN, INF = math.nan, math.inf


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=F64)


# --- token by token ---------------------------------------------------------------------------------------------------


def test_the_estimators_by_hand() -> None:
    logprobs, reference = row(-1.0, -2.0, -0.5), row(-1.5, -1.0, -0.5)
    assert k1(logprobs, reference).tolist() == [[0.5, -1.0, 0.0]]
    assert k2(logprobs, reference).tolist() == [[0.125, 0.5, 0.0]]
    wanted = [math.exp(-0.5) - 0.5, math.e - 2, 0.0]
    assert k3(logprobs, reference)[0].tolist() == pytest.approx(wanted, abs=1e-15)
    weighted = k3_weighted(logprobs, logprobs - math.log(2), reference)
    assert weighted[0].tolist() == pytest.approx([2 * x for x in wanted], abs=1e-14)


@given(gap=st.floats(1e-6, 1e-3))
def test_k3_keeps_its_digits_where_policy_and_reference_are_close(gap: float) -> None:
    found = k3(torch.tensor([[gap]]), torch.zeros(1, 1)).item()
    exact = gap * gap / 2 - gap**3 / 6
    # Cancellation leaves float32 about 1e-7 of u; exp(-u) - 1 + u in two steps leaves 1e-7 of 1.
    assert found == pytest.approx(exact, abs=2.5e-7 * gap)


@pytest.mark.parametrize("estimator", [k1, k2, k3, lambda lp, ref: k3_weighted(lp, row(-1.1, -2.1), ref)])
def test_estimators_have_the_gradient_of_finite_differences(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    logprobs, reference = row(-1.0, -2.0).requires_grad_(), row(-1.3, -1.2)
    assert torch.autograd.gradcheck(lambda lp: estimator(lp, reference), logprobs)


def test_estimators_send_gradient_to_the_policy_alone() -> None:
    logprobs, proximal, reference = (row(x, -1.0).requires_grad_() for x in (-0.5, -0.6, -0.7))
    loss = k1(logprobs, reference) + k2(logprobs, reference) + k3(logprobs, reference)
    (loss + k3_weighted(logprobs, proximal, reference)).sum().backward()
    assert logprobs.grad is not None
    assert proximal.grad is None
    assert reference.grad is None
    assert not kl_to_go(logprobs, reference, row(1, 1).bool()).requires_grad


def test_the_gradient_of_weighted_k3_is_the_ratio_times_u() -> None:
    logprobs, proximal, reference = row(-0.5, -2.0).requires_grad_(), row(-0.9, -1.7), row(-1.0, -1.0)
    k3_weighted(logprobs, proximal, reference).sum().backward()
    wanted = (logprobs - proximal).exp() * (logprobs - reference)
    torch.testing.assert_close(logprobs.grad, wanted.detach(), atol=1e-14, rtol=0)


def test_the_kl_to_go_sums_what_is_ahead_on_the_mask() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0] * 5]).bool()
    logprobs = torch.where(mask, torch.tensor([9.0, 1.0, 9.0, 2.0, 4.0], dtype=F64), NAN)
    reference = torch.where(mask, 0.0, torch.tensor(INF, dtype=F64))
    logprobs[1, 2] = 3.0
    assert kl_to_go(logprobs, reference, mask).tolist() == [[0, 7, 0, 6, 4], [0, 0, 3, 0, 0], [0] * 5]


@pytest.mark.parametrize("broken", [k1, k2, k3])
def test_a_broken_log_prob_stays_broken(broken: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert broken(row(NAN), row(-1.0)).isnan().all()
    assert kl_to_go(row(NAN, 0), row(0, 0), row(1, 1).bool()).isnan().tolist() == [[True, False]]


# --- one step: what each estimator estimates, and the gradient it has as a loss ---------------------------------------


class OneStep:
    """A policy over four symbols, another that sampled, and a reference; expectations by enumeration."""

    def __init__(self) -> None:
        self.theta = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=F64, requires_grad=True)
        self.logprobs = torch.log_softmax(self.theta, 0)[:, None]
        self.proximal = torch.log_softmax(torch.tensor([0.0, -0.5, 0.4, 0.9], dtype=F64), 0)[:, None]
        self.reference = torch.log_softmax(torch.tensor([-0.4, 0.6, 0.2, 0.3], dtype=F64), 0)[:, None]

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]

    def expected(self, values: Tensor, logprobs: Tensor) -> Tensor:
        return (logprobs.detach().exp() * values).sum()

    @property
    def kl(self) -> Tensor:
        return (self.logprobs.exp() * (self.logprobs - self.reference)).sum()

    @property
    def forward_kl(self) -> Tensor:
        return (self.reference.exp() * (self.reference - self.logprobs)).sum()


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() < 1e-10)


def test_the_value_of_k1_and_k3_is_unbiased_and_that_of_k2_is_not() -> None:
    toy = OneStep()
    values = {k: toy.expected(k(toy.logprobs, toy.reference), toy.logprobs) for k in (k1, k2, k3)}
    assert close(values[k1], toy.kl)
    assert close(values[k3], toy.kl)
    assert abs(values[k2] - toy.kl) > 0.01
    weighted = k3_weighted(toy.logprobs, toy.proximal, toy.reference)
    assert close(toy.expected(weighted, toy.proximal), toy.kl)


def test_as_a_loss_k1_has_no_gradient_k2_that_of_the_kl_and_k3_that_of_the_forward_kl() -> None:
    toy = OneStep()
    gradients = {k: toy.gradient(toy.expected(k(toy.logprobs, toy.reference), toy.logprobs)) for k in (k1, k2, k3)}
    assert close(gradients[k1], torch.zeros(4, dtype=F64))
    assert close(gradients[k2], toy.gradient(toy.kl))
    assert close(gradients[k3], toy.gradient(toy.forward_kl))
    assert not close(gradients[k3], toy.gradient(toy.kl))


def test_weighted_k3_has_the_gradient_of_the_kl_on_samples_of_another_policy() -> None:
    toy = OneStep()
    weighted = toy.expected(k3_weighted(toy.logprobs, toy.proximal, toy.reference), toy.proximal)
    assert close(toy.gradient(weighted), toy.gradient(toy.kl))
    assert not close(toy.gradient(toy.expected(k2(toy.logprobs, toy.reference), toy.proximal)), toy.gradient(toy.kl))


# --- two steps: the KL of sequences -----------------------------------------------------------------------------------


# Logits of the first symbol, then of the second after each first one. After symbol 1 policy and reference are far
# apart, after 2 they are close: what the first step costs is mostly what comes after it.
POLICY = [[0.2, 0.6, -0.3], [0.5, 0.0, -0.5], [2.0, -1.0, 0.0], [0.3, 0.1, 0.0]]
REFERENCE = [[-0.2, 0.3, 0.4], [0.0, 0.3, 0.2], [-0.5, 1.0, 0.2], [0.2, 0.0, 0.1]]


class TwoSteps:
    """Sequences [a, b] over three symbols, one a row; with `eos`, symbol 0 ends the sequence after one token."""

    def __init__(self, *, eos: bool) -> None:
        self.theta = torch.tensor(POLICY, dtype=F64, requires_grad=True)
        self.pairs = [(a, b) for a in range(3) for b in range(3) if not (eos and a == 0 and b > 0)]
        self.mask = torch.tensor([[True, not (eos and a == 0)] for a, _ in self.pairs])
        self.logprobs = self._of(self.theta)
        self.reference = self._of(torch.tensor(REFERENCE, dtype=F64))
        self.log_ratio = masked_sum(self.logprobs - self.reference, self.mask)
        self.probability = masked_sum(self.logprobs, self.mask).exp()
        self.kl = (self.probability * self.log_ratio).sum()
        self.kl_gradient = self._gradient(self.kl)

    def _of(self, theta: Tensor) -> Tensor:
        """Log-probs [rows, 2]: row 0 of `theta` for the first symbol, row 1 + a for the one after a."""
        logp = torch.log_softmax(theta, -1)
        both = torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a, b in self.pairs])
        return torch.where(self.mask, both, torch.full_like(both, NAN))

    def _gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]

    def gradient(self, loss_of_rows: Tensor) -> Tensor:
        """That of the expected loss on samples of the policy, which are not themselves differentiated."""
        return self._gradient((self.probability.detach() * loss_of_rows).sum())

    def error(self, loss_of_rows: Tensor) -> float:
        """Distance to the gradient of the KL, relative to that."""
        return float((self.gradient(loss_of_rows) - self.kl_gradient).norm() / self.kl_gradient.norm())

    def summed(self, estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return masked_sum(estimator(self.logprobs, self.reference), self.mask)


@pytest.fixture(params=[False, True], ids=["one length", "two lengths"])
def toy(request: pytest.FixtureRequest) -> TwoSteps:
    return TwoSteps(eos=request.param)


def test_the_enumeration_is_complete(toy: TwoSteps) -> None:
    assert toy.probability.sum().item() == pytest.approx(1.0, abs=1e-14)
    assert toy.kl > 0.1
    assert toy.gradient(toy.probability.log()).abs().max() < 1e-14  # E[score] = 0


def test_the_kl_to_go_on_every_token_has_the_gradient_of_the_kl(toy: TwoSteps) -> None:
    ahead = kl_to_go(toy.logprobs, toy.reference, toy.mask)
    assert toy.error(masked_sum(ahead * toy.logprobs, toy.mask)) < 1e-10
    assert close((toy.probability * ahead[:, 0]).sum(), toy.kl)


def test_so_do_the_whole_sum_on_every_token_and_half_its_square(toy: TwoSteps) -> None:
    whole = toy.log_ratio.detach()[:, None]
    assert toy.error(masked_sum(whole * toy.logprobs, toy.mask)) < 1e-10
    assert toy.error(toy.log_ratio.square() / 2) < 1e-10


def test_sums_over_tokens_of_k1_k2_and_k3_do_not(toy: TwoSteps) -> None:
    assert toy.gradient(toy.summed(k1)).abs().max() < 1e-14
    errors = {k.__name__: toy.error(toy.summed(k)) for k in (k2, k3)}
    assert min(errors.values()) > 0.5  # 0.68 and 0.75 with one length, 0.72 and 0.78 with two
    on_policy = masked_sum(k3_weighted(toy.logprobs, toy.logprobs.detach(), toy.reference), toy.mask)
    assert close(toy.gradient(on_policy), toy.gradient(toy.summed(k2)))


def test_the_value_of_summed_k1_and_k3_is_the_kl_of_sequences_all_the_same(toy: TwoSteps) -> None:
    for estimator in (k1, k3):
        assert close((toy.probability * toy.summed(estimator)).sum(), toy.kl)


def test_division_by_the_length_only_scales_the_gradient_while_all_have_one_length() -> None:
    toy = TwoSteps(eos=False)
    ahead = kl_to_go(toy.logprobs, toy.reference, toy.mask)
    assert close(2 * toy.gradient(masked_mean(ahead * toy.logprobs, toy.mask)), toy.kl_gradient)


def test_division_by_the_length_turns_the_gradient_where_lengths_differ() -> None:
    toy = TwoSteps(eos=True)
    ahead = kl_to_go(toy.logprobs, toy.reference, toy.mask)
    found = toy.gradient(masked_mean(ahead * toy.logprobs, toy.mask))
    scale = (found * toy.kl_gradient).sum() / found.square().sum()
    best = float((scale * found - toy.kl_gradient).norm() / toy.kl_gradient.norm())
    assert best > 0.1  # 0.17 after the best scaling, 0.55 as it is
