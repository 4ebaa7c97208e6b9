from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.weight_sync import digests
from rlhf.weight_sync.digests import Digests, device_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]
Digest = Callable[[Tensor], str]
dtypes = st.sampled_from(DTYPES)


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 40).to(dtype)


def on_device(tensor: Tensor) -> str:
    """The digest as a GPU computes it, computed here."""
    return f"{tensor.dtype}{tuple(tensor.shape)}:{int(device_sum(tensor)):x}"


def on_host(tensor: Tensor) -> str:
    found = Digests()
    found.add("it", tensor)
    return found.read()["it"]


BOTH = (on_host, on_device)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@given(dtype=dtypes, rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_a_change_of_any_single_element_changes_the_digest(
    dtype: torch.dtype, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    before = random_tensor(dtype, rows, columns, seed=seed)
    after = before.clone()
    where = data.draw(st.integers(0, before.numel() - 1))
    size = before.element_size()
    flip = 1 if dtype == torch.bool else data.draw(st.integers(1, 255))
    bits(after.view(-1))[where * size + data.draw(st.integers(0, size - 1))] ^= flip
    assert all(digest(after) != digest(before) for digest in BOTH)


@given(dtype=st.sampled_from([d for d in DTYPES if d.is_floating_point]), data=st.data())
def test_a_swap_of_two_elements_changes_the_digest_even_of_opposites(dtype: torch.dtype, data: st.DataObject) -> None:
    before = random_tensor(dtype, 40)
    i, j = data.draw(st.lists(st.integers(0, 39), min_size=2, max_size=2, unique=True))
    if data.draw(st.booleans()):
        before[j] = -before[i]
    after = before.clone()
    after[i], after[j] = before[j].clone(), before[i].clone()
    same_bits = torch.equal(bits(after), bits(before))
    assert all((digest(after) == digest(before)) == same_bits for digest in BOTH)


@pytest.mark.parametrize("digest", BOTH)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point])
def test_flipped_signs_do_not_cancel(dtype: torch.dtype, digest: Digest) -> None:
    before = random_tensor(dtype, 64)
    found = {digest(before), digest(-before)}
    for i in range(0, 64, 2):
        after = before.clone()
        after[[i, i + 1]] *= -1
        found.add(digest(after))
    assert len(found) == 34


@pytest.mark.parametrize("digest", BOTH)
def test_positive_and_negative_zero_differ_and_nan_equals_itself(digest: Digest) -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([float("nan")])) == digest(torch.tensor([float("nan")]))


@pytest.mark.parametrize("digest", BOTH)
def test_dtype_and_shape_are_part_of_it(digest: Digest) -> None:
    tensor = torch.zeros(2, 6)
    others = [tensor.view(6, 2), tensor.view(12), tensor.to(torch.bfloat16), tensor.to(torch.int32), torch.zeros(2, 7)]
    assert len({digest(t) for t in [tensor, *others]}) == 6


@given(dtype=dtypes, rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_a_view_has_the_digest_of_its_contiguous_copy(dtype: torch.dtype, rows: int, columns: int) -> None:
    whole = random_tensor(dtype, rows * 2, columns * 2)
    for view in (whole.t(), whole[::2], whole[:, 1::2], whole[1:, 1:], whole[:1].expand(3, -1)):
        whole_copy = view.clone(memory_format=torch.contiguous_format)
        assert all(digest(view) == digest(whole_copy) for digest in BOTH)


def test_scalars_and_empty_tensors_have_one() -> None:
    assert on_host(torch.tensor(3.0)).startswith("float32[]:")
    assert on_host(torch.zeros(0, 3)).startswith("float32[0x3]:")
    assert int(device_sum(torch.zeros(0, 3))) == 0


def test_the_chunks_it_is_computed_in_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(torch.bfloat16, 1000)
    whole = int(device_sum(tensor))
    for size in (1, 7, 999, 1000):
        monkeypatch.setattr(digests, "_CHUNK", size)
        assert int(device_sum(tensor)) == whole


@pytest.mark.parametrize("digest", BOTH)
def test_parameters_that_require_gradients_are_read_without_one(digest: Digest) -> None:
    assert digest(torch.ones(2, requires_grad=True)) == digest(torch.ones(2))


def test_digests_are_read_by_name_in_order_and_one_can_be_taken_over() -> None:
    first, second = Digests(), Digests()
    for name, value in (("b", 1.0), ("a", 2.0)):
        first.add(name, torch.tensor([value]))
    second.copy_from(first, "a")
    assert list(first.read()) == ["b", "a"]
    assert second.read() == {"a": first.read()["a"]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_computes_the_sum_that_is_computed_here(dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, 3000, 1501)  # more than one chunk
    assert int(device_sum(tensor.cuda())) == int(device_sum(tensor))
