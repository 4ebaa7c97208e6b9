"""Metrics of tokens, gathered over micro-batches and ranks without averaging averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EXTREMA = ("policy/ratio", "mismatch/ratio")
"""Metrics whose raw minimum and maximum are logged beside the mean: an average hides what explodes."""
MAXIMA = ("mismatch/abs_gap_nats", "mismatch/fresh/abs_gap_nats")
"""Metrics whose maximum alone is logged beside the mean."""

RowMetrics = Mapping[str, tuple[Tensor, Tensor]]
"""Name -> (values [B], bool [B] of the rows that have one)."""


@dataclass(slots=True)
class MetricSums:
    """Sum, count, minimum and maximum of each metric."""

    totals: dict[str, list[float]] = field(default_factory=dict)

    def merge(self, other: MetricSums) -> None:
        for name, (total, count, low, high) in other.totals.items():
            mine = self.totals.setdefault(name, [0.0, 0.0, float("inf"), float("-inf")])
            mine[0] += total
            mine[1] += count
            mine[2] = min(mine[2], low)
            mine[3] = max(mine[3], high)

    def result(self) -> dict[str, float]:
        """Means by name; for those in `EXTREMA` also `<name>_min` and `<name>_max`, in `MAXIMA` the latter."""
        out = {}
        for name, (total, count, low, high) in self.totals.items():
            out[name] = total / count
            if name in EXTREMA:
                out[f"{name}_min"] = low
            if name in EXTREMA or name in MAXIMA:
                out[f"{name}_max"] = high
        return out


def merged(parts: Iterable[MetricSums]) -> MetricSums:
    whole = MetricSums()
    for part in parts:
        whole.merge(part)
    return whole


class DeviceMetrics:
    """Gathers the metrics of a step where the tensors are; only `sums` waits for the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._totals: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], mask: Tensor) -> None:
        """Take in values [B, T] (or any shape of `mask`) where `mask` is True."""
        if metrics:
            values = torch.stack([value.detach().double() for value in metrics.values()]).flatten(1)
            self._names += list(metrics)
            self._totals.append(_totals(values, mask.flatten().expand_as(values)))

    def add_rows(self, metrics: RowMetrics, present: Tensor) -> None:
        """Take in the values [B] of rows that have one and are `present` bool [B]."""
        if metrics:
            values = torch.stack([value.detach().double() for value, _ in metrics.values()])
            self._names += list(metrics)
            self._totals.append(_totals(values, torch.stack([where for _, where in metrics.values()]) & present))

    def sums(self) -> MetricSums:
        """Everything so far, in one transfer from the device; metrics without any value are left out."""
        whole = MetricSums()
        if not self._totals:
            return whole
        rows = torch.cat(self._totals).tolist()
        for name, row in zip(self._names, rows, strict=True):
            if row[1]:
                whole.merge(MetricSums({name: row}))
        return whole


def _totals(values: Tensor, mask: Tensor) -> Tensor:
    """[K, 4]: sum, count, minimum and maximum of `values` float64 [K, n] where `mask` [K, n].

    NaN off the mask is not seen.
    """
    total = torch.where(mask, values, 0.0).sum(-1)
    low = torch.where(mask, values, torch.inf).amin(-1)
    high = torch.where(mask, values, -torch.inf).amax(-1)
    return torch.stack([total, mask.sum(-1).double(), low, high], -1)
