"""A checksum of a tensor's bits that runs where the tensor lives."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22
# Eight bytes count as two elements: a flipped sign is 2^63, and an even number of those cancels in a 64-bit sum.
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def tensor_digest(tensor: Tensor) -> str:
    """Digest of dtype, shape and every bit of `tensor`, equal on any device.

    A sum modulo 2^64 of element bits times odd, position-dependent multipliers. Odd numbers are invertible, so a change
    of any single element (up to four bytes wide) always changes the digest; the positions make swaps show. Not meant
    against an adversary.
    """
    flat = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    total = 0
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + chunk.numel(), device=chunk.device, dtype=torch.int64)
        multiplier = (position * 0x9E3779B97F4A7C1) | 1
        total += int((chunk * (multiplier ^ (multiplier >> 31) | 1)).sum())
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{total % 2**64:016x}"
