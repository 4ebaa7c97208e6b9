"""Metrics of tokens, gathered over micro-batches and ranks without averaging averages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

EXTREMA = ("policy/ratio", "mismatch/ratio")
"""Metrics whose raw minimum and maximum are logged beside the mean: an average hides what explodes."""


@dataclass(slots=True)
class TokenMetrics:
    """Sum, count, minimum and maximum of each metric over the tokens, or rows, of a mask."""

    totals: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Take in `values` where `mask` is True; both [B, T], or [B] for metrics of whole rows."""
        chosen = values.detach()[mask].double()
        if not chosen.numel():
            return
        low, high = torch.aminmax(chosen)
        self._merge(name, [chosen.sum().item(), float(chosen.numel()), low.item(), high.item()])

    def merge(self, other: TokenMetrics) -> None:
        for name, totals in other.totals.items():
            self._merge(name, totals)

    def _merge(self, name: str, totals: list[float]) -> None:
        mine = self.totals.setdefault(name, [0.0, 0.0, float("inf"), float("-inf")])
        mine[0] += totals[0]
        mine[1] += totals[1]
        mine[2] = min(mine[2], totals[2])
        mine[3] = max(mine[3], totals[3])

    def result(self) -> dict[str, float]:
        """Means by name; for those in `EXTREMA` also `<name>_min` and `<name>_max`."""
        out = {}
        for name, (total, count, low, high) in self.totals.items():
            out[name] = total / count
            if name in EXTREMA:
                out |= {f"{name}_min": low, f"{name}_max": high}
        return out


def merged(parts: Iterable[TokenMetrics]) -> TokenMetrics:
    whole = TokenMetrics()
    for part in parts:
        whole.merge(part)
    return whole
