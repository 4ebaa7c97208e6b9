"""Log-probs and entropy in chunks of logits against the form with all logits at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses.logprobs import CHUNK_LOGITS, head_logprobs
from tests.rlhf.naive_logprobs import logprobs_and_entropy

F64 = torch.float64
ROWS, HIDDEN, VOCABULARY = 13, 6, 10
TOLERANCE = {torch.float32: 1e-5, F64: 1e-12}

temperatures = pytest.mark.parametrize("temperature", [1.0, 0.7])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
chunks = pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 14, 1000])
"""Rows of a chunk; 13 are all."""


class Case:
    """Hidden states, output head and targets, and an upstream gradient of many magnitudes."""

    def __init__(self, dtype: torch.dtype = F64, *, bias: bool = True, rows: int = ROWS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.hidden = (2 * noise(rows, HIDDEN)).to(dtype).requires_grad_()
        self.weight = noise(VOCABULARY, HIDDEN).to(dtype).requires_grad_()
        self.bias = noise(VOCABULARY).to(dtype).requires_grad_() if bias else None
        self.targets = torch.randint(VOCABULARY, (rows,), generator=generator)
        self.upstream = noise(rows)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])

    def chunked(self, rows: int = 5, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        return head_logprobs(
            self.hidden,
            self.weight,
            self.targets,
            bias=self.bias,
            temperature=temperature,
            chunk_logits=rows * VOCABULARY,
        )

    def at_once(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """In float64, whatever the dtype."""
        logits = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            logits = logits + self.bias.double()
        return logprobs_and_entropy(logits, self.targets, temperature)

    def gradients(self, logprobs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logprobs * self.upstream.to(logprobs.dtype)).sum(), self.leaves)


def assert_equal_forms(case: Case, rows: int, temperature: float, tolerance: float) -> None:
    logprobs, entropy = case.chunked(rows, temperature)
    expected, expected_entropy = case.at_once(temperature)
    torch.testing.assert_close(logprobs.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=tolerance, rtol=tolerance)
    for found, wanted in zip(case.gradients(logprobs), case.gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
        assert found.norm() > 0.1


# --- against the form with all logits ---------------------------------------------------------------------------------


@every_dtype
@temperatures
@chunks
@pytest.mark.parametrize("bias", [True, False])
def test_values_entropy_and_gradients_are_those_of_all_logits_at_once(
    dtype: torch.dtype, temperature: float, rows: int, bias: bool
) -> None:
    assert_equal_forms(Case(dtype, bias=bias), rows, temperature, TOLERANCE[dtype])


@given(
    seed=st.integers(0, 2**20), temperature=st.floats(0.1, 4.0), rows=st.integers(1, 12), of_a_chunk=st.integers(1, 12)
)
def test_any_split_at_any_temperature_gives_the_values_and_gradients_of_all_logits_at_once(
    seed: int, temperature: float, rows: int, of_a_chunk: int
) -> None:
    case = Case(rows=rows, seed=seed)
    logprobs, entropy = case.chunked(of_a_chunk, temperature)
    expected, expected_entropy = case.at_once(temperature)
    torch.testing.assert_close(logprobs, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-11, rtol=1e-11)
    for found, wanted in zip(case.gradients(logprobs), case.gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@temperatures
def test_log_probs_and_entropy_by_hand(temperature: float) -> None:
    """The logits are the rows of `hidden`, through a head that changes nothing."""
    logits = [[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]]
    found, entropy = head_logprobs(
        torch.tensor(logits, dtype=F64), torch.eye(3, dtype=F64), torch.tensor([2, 1]), temperature=temperature
    )
    for row, target, value, spread in zip(logits, (2, 1), found.tolist(), entropy.tolist(), strict=True):
        weights = [math.exp(x / temperature) for x in row]
        shares = [w / sum(weights) for w in weights]
        assert value == pytest.approx(math.log(shares[target]), abs=1e-14)
        assert spread == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-14)


def test_the_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary() -> None:
    logprobs, entropy = head_logprobs(torch.zeros(3, 2), torch.randn(8, 2), torch.tensor([0, 5, 7]))
    torch.testing.assert_close(entropy, torch.full((3,), math.log(8)), atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs, -entropy, atol=1e-6, rtol=0)


@temperatures
@pytest.mark.parametrize("rows", [1, 2, 12])
def test_gradients_are_those_of_finite_differences(temperature: float, rows: int) -> None:
    """Not with one chunk of all rows, where a second pass, which gradcheck makes, is refused."""
    case = Case()

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return case.chunked(rows, temperature)[0]

    assert torch.autograd.gradcheck(logprobs, tuple(case.leaves))


def test_repeated_targets_add_up_in_the_head() -> None:
    case = Case()
    case.targets = torch.full((ROWS,), 4)
    assert_equal_forms(case, 3, 1.0, 1e-12)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "returned"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)], ids=str
)
def test_results_are_float32_or_wider_and_gradients_have_the_dtype_of_their_tensor(
    taken: torch.dtype, returned: torch.dtype
) -> None:
    case = Case(taken)
    logprobs, entropy = case.chunked()
    assert logprobs.dtype == entropy.dtype == returned
    assert {gradient.dtype for gradient in case.gradients(logprobs)} == {taken}


@temperatures
@pytest.mark.parametrize("rows", [1, 4, 13])
def test_in_bfloat16_only_logits_and_results_are_rounded(temperature: float, rows: int) -> None:
    case = Case(torch.bfloat16)
    with torch.no_grad():
        case.hidden.mul_(0.25)
    logprobs, entropy = case.chunked(rows, temperature)
    expected, expected_entropy = case.at_once(temperature)
    assert case.hidden.matmul(case.weight.T).abs().max() < 6
    # A logit below 8 is rounded by at most 2^-6; those of the target and of the others may go opposite ways.
    assert (logprobs - expected).abs().max() < 2 * 2**-6 / temperature
    assert (entropy - expected_entropy).abs().max() < 0.05
    for found, wanted in zip(case.gradients(logprobs), case.gradients(expected), strict=True):
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 0.02


def test_in_bfloat16_the_gradient_of_the_head_is_summed_over_chunks_in_float32() -> None:
    """512 equal parts of a half: a bfloat16 sum would stop growing at 128."""
    rows = 512
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    head_logprobs(hidden, weight, targets, chunk_logits=2)[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [rows / 2, -rows / 2]


# --- the edge ---------------------------------------------------------------------------------------------------------


@temperatures
@pytest.mark.parametrize("rows", [2, 13])
def test_a_bias_of_minus_infinity_bans_a_token(temperature: float, rows: int) -> None:
    case = Case()
    assert case.bias is not None
    with torch.no_grad():
        case.bias[[3, 7]] = -math.inf
        case.targets[torch.isin(case.targets, torch.tensor([3, 7]))] = 1
    logprobs, entropy = case.chunked(rows, temperature)
    expected, expected_entropy = case.at_once(temperature)
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-12, rtol=0)
    for found, wanted in zip(case.gradients(logprobs), case.gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert case.gradients(case.chunked(rows, temperature)[0])[2][[3, 7]].tolist() == [0.0, 0.0]


def test_a_banned_target_has_log_prob_minus_infinity_and_the_others_stay_finite() -> None:
    case = Case()
    assert case.bias is not None
    with torch.no_grad():
        case.bias[3] = -math.inf
    case.targets[:] = 1
    case.targets[5] = 3
    logprobs, entropy = case.chunked(4)
    assert logprobs[5] == -math.inf
    assert logprobs.isfinite().sum() == ROWS - 1
    assert entropy.isfinite().all()


def test_logits_of_thousands_overflow_nowhere() -> None:
    scale = torch.tensor([[3e4], [-3e4]], dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    logprobs, entropy = head_logprobs(scale, weight, torch.tensor([0, 0]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, -6e4]
    assert entropy.tolist() == [0.0, 0.0]
    assert scale.grad is not None
    assert scale.grad.tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_stays_in_its_row(value: float) -> None:
    case, clean = Case(), Case()
    with torch.no_grad():
        case.hidden[4] = value
    others = torch.arange(ROWS) != 4
    found, entropy = case.chunked(3)
    wanted, wanted_entropy = clean.chunked(3)
    assert found[4].isnan()
    assert torch.equal(found[others], wanted[others])
    assert torch.equal(entropy[others], wanted_entropy[others])


@temperatures
def test_without_rows_the_result_is_empty_but_connected_so_that_collectives_stay_paired(temperature: float) -> None:
    case = Case(torch.float32, rows=0)
    logprobs, entropy = case.chunked(temperature=temperature)
    assert logprobs.shape == entropy.shape == (0,)
    gradients = case.gradients(logprobs)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in case.leaves]
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@chunks
def test_a_vocabulary_larger_than_a_chunk_goes_row_by_row(rows: int) -> None:
    case = Case(rows=rows)
    logprobs, _ = head_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, chunk_logits=1)
    torch.testing.assert_close(logprobs, case.at_once()[0], atol=1e-12, rtol=0)


# --- what carries gradient, and what stays as it was ------------------------------------------------------------------


def test_log_probs_carry_gradient_and_entropy_does_not() -> None:
    logprobs, entropy = Case().chunked()
    assert logprobs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("rows", [4, 13])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("weight",), ("bias",)], ids="-".join)
def test_only_what_asks_for_a_gradient_gets_one(rows: int, frozen: tuple[str, ...]) -> None:
    case, free = Case(), Case()
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    (case.chunked(rows)[0] * case.upstream).sum().backward()
    (free.at_once()[0] * free.upstream).sum().backward()
    for name in ("hidden", "weight", "bias"):
        found, wanted = getattr(case, name).grad, getattr(free, name).grad
        if name in frozen:
            assert found is None
        else:
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [4, 13])
@temperatures
def test_the_inputs_are_not_changed(rows: int, temperature: float) -> None:
    case = Case()
    before = [leaf.detach().clone() for leaf in case.leaves]
    case.gradients(case.chunked(rows, temperature)[0])
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(case.leaves, before, strict=True))


@pytest.mark.parametrize("rows", [4, 13])
def test_without_gradients_the_values_are_bit_equal(rows: int) -> None:
    case = Case()
    with torch.no_grad():
        quiet = case.chunked(rows)
    assert all(torch.equal(a, b) for a, b in zip(quiet, case.chunked(rows), strict=True))


def test_a_gradient_can_be_taken_once_and_of_no_second_order() -> None:
    """A second pass over the same chunk would start from probabilities that the first has used up."""
    case = Case()
    logprobs, _ = case.chunked(ROWS)
    torch.autograd.grad(logprobs.sum(), case.leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logprobs.sum(), case.leaves)
    for rows in (4, ROWS):
        (first,) = torch.autograd.grad(case.chunked(rows)[0].square().sum(), case.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
def test_between_the_passes_nothing_as_large_as_the_logits_is_kept(rows: int) -> None:
    case = Case()
    logprobs, _ = case.chunked(rows)
    kept = [tensor.shape for tensor in logprobs.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    assert torch.Size([ROWS, VOCABULARY]) not in kept
    assert torch.Size([rows, VOCABULARY]) not in kept


def test_no_tensor_is_larger_than_a_chunk_of_logits_in_either_pass() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **kwargs or {})
            for value in torch.utils._pytree.tree_leaves(out):
                if isinstance(value, Tensor):
                    self.elements = max(self.elements, value.numel())
            return out

    case = Case(rows=200)
    with Largest() as largest:
        case.gradients(case.chunked(rows=7, temperature=0.7)[0])
    assert 7 * VOCABULARY <= largest.elements <= 200 * HIDDEN
    with Largest() as largest:
        case.gradients(case.at_once(0.7)[0])
    assert largest.elements >= 200 * VOCABULARY


def test_by_default_a_chunk_of_a_large_vocabulary_holds_hundreds_of_rows() -> None:
    assert 256 <= CHUNK_LOGITS // 153_600 <= 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_dtype
@chunks
def test_a_gpu_gives_the_same_values_and_gradients(dtype: torch.dtype, rows: int) -> None:
    case = Case(dtype)
    expected, expected_entropy = case.at_once(0.7)
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in case.leaves]
    hidden, weight, bias = on_gpu
    logprobs, entropy = head_logprobs(
        hidden, weight, case.targets.cuda(), bias=bias, temperature=0.7, chunk_logits=rows * VOCABULARY
    )
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(logprobs.double().cpu(), expected, **close)
    torch.testing.assert_close(entropy.double().cpu(), expected_entropy, **close)
    gradients = torch.autograd.grad((logprobs * case.upstream.to(logprobs)).sum(), on_gpu)
    for found, wanted in zip(gradients, case.gradients(expected), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, **close)
