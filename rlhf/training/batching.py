"""How the rows of one optimiser step are dealt to ranks and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.batches import Rows

R = TypeVar("R", bound=Rows)


def deal(lengths: Tensor, ranks: int) -> list[Tensor]:
    """Row indices of each rank, for `lengths` [N]: longest first, back and forth, so that ranks get like work.

    Every row is dealt exactly once; a rank may get none when there are fewer rows than ranks.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    lap = torch.arange(len(order)) // ranks
    place = torch.arange(len(order)) % ranks
    owner = torch.where(lap % 2 == 0, place, ranks - 1 - place)
    return [order[owner == rank] for rank in range(ranks)]


def micro_batch_count(rows: int, ranks: int, micro_batch_size: int) -> int:
    """Micro-batches every rank runs; all ranks run the same number because ZeRO's collectives pair them up."""
    per_rank = -(-rows // ranks)
    return max(1, -(-per_rank // micro_batch_size))


def micro_batches(batch: R, micro_batch_size: int, count: int) -> Iterator[tuple[Tensor, R]]:
    """`count` pairs (row indices [B], rows), longest rows first; ones past the end are idle rows without any weight."""
    assert len(batch) <= count * micro_batch_size, f"{len(batch)} rows, room for {count} x {micro_batch_size}"
    order = torch.argsort(batch.lengths, descending=True, stable=True)
    for number in range(count):
        index = order[number * micro_batch_size : (number + 1) * micro_batch_size]
        yield index, batch.rows(index) if len(index) else idle_row(batch)


def idle_row(batch: R) -> R:
    """One row of two tokens with an empty loss mask and zeros everywhere: keeps a rank in step without any gradient."""
    values = {}
    for item in fields(batch):
        value: Tensor = getattr(batch, item.name)
        shape = (1, 2) if value.ndim == 2 else (1,)
        values[item.name] = torch.zeros(shape, dtype=value.dtype)
    return replace(batch, **{**values, "lengths": torch.full((1,), 2)})
