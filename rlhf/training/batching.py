"""How the rows of one optimiser step are dealt to ranks and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.batches import Rows

R = TypeVar("R", bound=Rows)


def deal(batch: Rows, ranks: int) -> list[Tensor]:
    """Row indices of each rank: longest units first, back and forth, so that ranks get like work.

    Every row is dealt exactly once, with the other rows of its unit; a rank may get none when there are few units.
    """
    order = _longest_units_first(batch)
    lap = torch.arange(len(order)) // ranks
    place = torch.arange(len(order)) % ranks
    owner = torch.where(lap % 2 == 0, place, ranks - 1 - place)
    return [order[owner == rank].flatten() for rank in range(ranks)]


def micro_batch_count(batch: Rows, ranks: int, micro_batch_size: int) -> int:
    """Micro-batches every rank runs; all ranks run the same number because ZeRO's collectives pair them up."""
    units = len(batch) // batch.rows_per_unit
    return micro_batches_of(units, ranks, _units(batch, micro_batch_size))


def micro_batches_of(units: int, ranks: int, units_at_a_time: int) -> int:
    per_rank = -(-units // ranks)
    return max(1, -(-per_rank // units_at_a_time))


def micro_batches(batch: R, micro_batch_size: int, count: int) -> Iterator[tuple[Tensor, R]]:
    """`count` pairs (row indices [B], rows), longest first; ones past the end are an idle unit without any weight."""
    size = _units(batch, micro_batch_size)
    order = _longest_units_first(batch)
    assert len(order) <= count * size, f"{len(order)} units, room for {count} x {size}"
    for number in range(count):
        index = order[number * size : (number + 1) * size].flatten()
        yield index, batch.rows(index) if len(index) else idle_unit(batch)


def idle_unit(batch: R) -> R:
    """One unit of two-token rows with an empty loss mask and zeros: keeps a rank in step without any gradient."""
    values, rows = {}, batch.rows_per_unit
    for item in fields(batch):
        value: Tensor = getattr(batch, item.name)
        shape = (rows, 2 if value.shape[1] else 0) if value.ndim == 2 else (rows,)
        values[item.name] = torch.zeros(shape, dtype=value.dtype)
    return replace(batch, **{**values, "lengths": torch.full((rows,), 2)})


def _units(batch: Rows, rows: int) -> int:
    """How many units `rows` rows have room for; at least one."""
    return max(1, rows // batch.rows_per_unit)


def _longest_units_first(batch: Rows) -> Tensor:
    """Row indices [units, rows_per_unit]."""
    index = torch.arange(len(batch)).view(-1, batch.rows_per_unit)
    longest = batch.lengths[index].amax(-1) if len(batch) else batch.lengths.new_zeros(0)
    return index[torch.argsort(longest, descending=True, stable=True)]
