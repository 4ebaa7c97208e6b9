"""The learner's weights as a stream, layer by layer: the whole model is never gathered at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.weight_sync.digests import Digests


class ParameterMeta(NamedTuple):
    """What vLLM calls ParamMeta: name, wire dtype and whole shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class FullParameters(Protocol):
    """What the source needs of the training engine; see `DeepSpeedEngine`."""

    @property
    def state_names(self) -> Sequence[str]: ...

    def full_parameters(self, names: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]: ...

    def full_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]: ...


class ZeroWeightSource:
    """vLLM's `WeightSource` contract over DeepSpeed ZeRO 1, 2 and 3.

    `metadata()` describes every tensor without gathering; iteration yields `(name, tensor)` in the same order. All
    ranks must iterate in step, because gathering is a collective, and at most one layer group is gathered at a time.
    Each pass over the tensors leaves the digests of what it yielded, on the ranks that are asked for them.
    """

    def __init__(self, parameters: FullParameters, *, with_digests: bool = True) -> None:
        self._parameters = parameters
        self._with_digests = with_digests
        self._groups = layer_groups(parameters.state_names)
        self._digests = Digests()

    @cached_property
    def _metadata(self) -> list[ParameterMeta]:
        names = [name for group in self._groups for name in group]
        return [ParameterMeta(name, *self._parameters.full_shape(name)) for name in names]

    def metadata(self) -> list[ParameterMeta]:
        """Every tensor, in the order of iteration."""
        return self._metadata

    @property
    def size_bytes(self) -> int:
        """Bytes of one copy of the weights."""
        return sum(meta.size_bytes for meta in self._metadata)

    @property
    def digests(self) -> dict[str, str]:
        """Of what the last pass over the tensors has yielded; empty before the first."""
        return self._digests.read()

    def iter_groups(self) -> Iterator[dict[str, Tensor]]:
        """One dict of whole tensors for each layer group, lent until the next one is drawn."""
        for names in self._groups:
            with self._parameters.full_parameters(names) as tensors:
                yield {name: tensors[name] for name in names}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Copies, because a transport may still be sending when the gathered storage is given back."""
        self._digests = Digests()
        for names in self._groups:
            with self._parameters.full_parameters(names) as tensors:
                copies = {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in names}
            for name, tensor in copies.items():
                if self._with_digests:
                    self._digests.add(name, tensor)
                yield name, tensor


def layer_groups(names: Sequence[str]) -> list[list[str]]:
    """Names grouped by decoder layer (the first number in the dotted name), in order; runs without a number are groups.

    vLLM's layerwise reload finishes a layer when all of it has come, so a layer's tensors must stay together.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    stretch = 0
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            key: tuple[object, ...] = ("rest", stretch)
        else:
            key = (".".join(parts[:number]), parts[number])
            stretch = len(groups) + 1
        groups.setdefault(key, []).append(name)
    return list(groups.values())
