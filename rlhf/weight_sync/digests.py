"""Checksums of tensors, computed where the tensors live."""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from torch import Tensor

_CHUNK = 1 << 22
# Eight bytes count as two elements: a flipped sign is 2^63, and an even number of those cancels in a 64-bit sum.
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class Digests:
    """Digest by name of every tensor that was added: of its dtype, its shape and all its bits.

    XXH3 of the bytes in host memory. On a GPU, which would have to send them there first, a sum over the elements that
    is read when the digests are asked for, so that adding a tensor does not wait for the device. Both ends of a
    transport must add tensors on the same kind of device. Not meant against an adversary.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str | Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        value = (
            device_sum(tensor) if tensor.is_cuda else xxhash.xxh3_64_hexdigest(memoryview(tensor_bytes(tensor).data))
        )
        self._found[name] = (_kind(tensor), value)

    def copy_from(self, other: Digests, name: str) -> None:
        """Take over a digest that was computed before."""
        self._found[name] = other._found[name]

    def read(self) -> dict[str, str]:
        """The digests in the order in which tensors were added."""
        return {name: f"{kind}:{_text(value)}" for name, (kind, value) in self._found.items()}


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor in host memory, uint8 [n]: without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def device_sum(tensor: Tensor) -> Tensor:
    """A sum modulo 2^64 of the bits of every element times odd, position-dependent multipliers, int64 [].

    Odd numbers are invertible, so a change of any single element (up to four bytes wide) always changes the sum; the
    positions make swaps show.
    """
    flat = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + chunk.numel(), device=chunk.device, dtype=torch.int64)
        multiplier = (position * 0x9E3779B97F4A7C1) | 1
        total += (chunk * (multiplier ^ (multiplier >> 31) | 1)).sum()
    return total


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{'x'.join(map(str, tensor.shape))}]"


def _text(value: str | Tensor) -> str:
    return value if isinstance(value, str) else f"{int(value) % 2**64:016x}"
