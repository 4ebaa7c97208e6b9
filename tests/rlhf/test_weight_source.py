from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.weight_sync.digests import Digests
from rlhf.weight_sync.source import ZeroWeightSource, layer_groups

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.weight",
    "model.layers.0.norm.weight",
    "model.layers.1.mlp.weight",
    "model.layers.1.norm.weight",
    "model.layers.10.mlp.weight",
    "model.norm.weight",
    "lm_head.weight",
]


class Engine:
    """Parameters that exist whole only while they are gathered, like those of ZeRO-3."""

    def __init__(self, names: Sequence[str] = NAMES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {name: torch.randn(3, 2, generator=generator).t() for name in names}
        self.state_names = list(names)
        self.gathered: list[list[str]] = []
        self.open = 0

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        self.gathered.append(list(names))
        self.open += 1
        assert self.open == 1, "two layer groups at a time"
        lent = {name: self.tensors[name].clone() for name in reversed(names)}  # any order will do
        yield lent
        self.open -= 1
        for tensor in lent.values():
            tensor.zero_()

    def full_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.float32, (2, 3)


def test_tensors_are_gathered_layer_by_layer() -> None:
    assert layer_groups(NAMES) == [NAMES[:1], NAMES[1:3], NAMES[3:5], NAMES[5:6], NAMES[6:]]


def test_towers_with_layers_of_the_same_number_are_kept_apart() -> None:
    names = ["vision.blocks.0.w", "vision.merger.w", "model.layers.0.a", "model.layers.0.experts.7.w", "lm_head.w"]
    assert layer_groups(names) == [names[:1], names[1:2], names[2:4], names[4:]]


part = st.sampled_from(["model.embed", "model.norm", "lm_head", "model.layers.0.a", "model.layers.0.b.3.c"])
more = st.sampled_from(["model.layers.1.a", "model.layers.11.a", "vision.blocks.0.a", "vision.blocks.1.a"])


@given(names=st.lists(part | more, unique=True))
def test_groups_never_mix_layers_never_split_one_and_lose_nothing(names: list[str]) -> None:
    def layer(name: str) -> tuple[str, ...]:
        before, number, _ = (name.partition(f".{n}.") for n in (0, 1, 11) if f".{n}." in name).__next__()
        return before, number

    groups = layer_groups(names)
    assert sorted(n for group in groups for n in group) == sorted(names)
    layers = [{layer(n) if any(c.isdigit() for c in n) else ("rest",) for n in group} for group in groups]
    assert all(len(found) == 1 for found in layers)
    numbered = [found.pop() for found in layers if found != {("rest",)}]
    assert len(numbered) == len(set(numbered))


def test_iteration_yields_every_tensor_once_in_the_order_of_the_metadata() -> None:
    engine = Engine()
    source = ZeroWeightSource(engine)
    items = dict(source)
    assert list(items) == [meta.name for meta in source.metadata()] == NAMES
    assert engine.gathered == layer_groups(NAMES)
    for name, tensor in items.items():
        assert torch.equal(tensor, engine.tensors[name])
        assert tensor.is_contiguous()


def test_metadata_is_read_without_gathering() -> None:
    engine = Engine()
    meta = ZeroWeightSource(engine).metadata()[0]
    assert meta == ("model.embed_tokens.weight", torch.float32, (2, 3))
    assert engine.gathered == []


def test_the_bytes_of_a_copy_are_known_from_the_metadata() -> None:
    assert ZeroWeightSource(Engine()).size_bytes == len(NAMES) * 2 * 3 * 4


def test_tensors_outlive_the_gathered_storage() -> None:
    engine = Engine()
    items = list(ZeroWeightSource(engine))
    assert all(torch.equal(tensor, engine.tensors[name]) for name, tensor in items)


def test_groups_are_lent_until_the_next_one_is_drawn() -> None:
    engine = Engine()
    for group in ZeroWeightSource(engine).iter_groups():
        assert engine.open == 1
        assert all(torch.equal(tensor, engine.tensors[name]) for name, tensor in group.items())
    assert engine.open == 0


def test_a_pass_leaves_the_digests_of_what_it_yielded() -> None:
    engine = Engine()
    source = ZeroWeightSource(engine)
    assert source.digests == {}
    expected = Digests()
    for name, tensor in engine.tensors.items():
        expected.add(name, tensor)
    for _ in range(2):
        list(source)
        assert source.digests == expected.read()


def test_a_pass_that_is_broken_off_leaves_no_digests_of_the_pass_before() -> None:
    source = ZeroWeightSource(Engine())
    list(source)
    next(iter(source))
    assert list(source.digests) == NAMES[:1]
