"""The learner's weights as a stream, layer by layer: the whole model is never gathered at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.weight_sync.digests import tensor_digest


class ParameterMeta(NamedTuple):
    """What vLLM calls ParamMeta: name, wire dtype and whole shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class FullParameters(Protocol):
    """What the source needs of the training engine; see `DeepSpeedEngine`."""

    @property
    def state_names(self) -> Sequence[str]: ...

    def full_parameters(self, names: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]: ...

    def full_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]: ...


class ZeroWeightSource:
    """vLLM's `WeightSource` contract over DeepSpeed ZeRO 1, 2 and 3.

    `metadata()` describes every tensor without gathering; iteration yields `(name, tensor)` in the same order. All
    ranks must iterate in step: gathering is a collective. Tensors are copies, valid after the next one is drawn, and
    at most one layer group is gathered at a time. Each pass leaves the digests of what it yielded in `digests`, on the
    ranks that are asked for them.
    """

    def __init__(self, parameters: FullParameters, *, with_digests: bool = True) -> None:
        self._parameters = parameters
        self._with_digests = with_digests
        self._groups = layer_groups(parameters.state_names)
        self.digests: dict[str, str] = {}

    def rebind(self, parameters: FullParameters) -> None:
        """Read from another engine of the same model from now on: each stage has its own optimiser and engine."""
        if list(parameters.state_names) != list(self._parameters.state_names):
            raise ValueError("the new engine has other tensors than the one the transport was opened for")
        self._parameters = parameters

    def metadata(self) -> list[ParameterMeta]:
        names = [name for group in self._groups for name in group]
        return [ParameterMeta(name, *self._parameters.full_shape(name)) for name in names]

    def iter_groups(self) -> Iterator[dict[str, Tensor]]:
        """One dict of whole tensors for each layer group."""
        self.digests = {}
        for names in self._groups:
            with self._parameters.full_parameters(names) as tensors:
                # The gathered storage is given back when the context closes, a transport may still be sending.
                group = {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in names}
            if self._with_digests:
                self.digests |= {name: tensor_digest(tensor) for name, tensor in group.items()}
            yield group
            del group  # or it would live on while the next one is gathered

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.iter_groups():
            yield from group.items()


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
