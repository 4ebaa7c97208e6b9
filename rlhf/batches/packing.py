"""Cut the sequences of an optimiser step into micro-batches of like work, the same number on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from rlhf.batches.ragged import Sequences, StoredSequences


class Selectable(Protocol):
    """Sequences, with their tokens or without."""

    def select(self, index: np.ndarray) -> Self: ...


S = TypeVar("S", bound=Selectable)
S_co = TypeVar("S_co", bound=Selectable, covariant=True)
WithTokens = TypeVar("WithTokens", bound=Sequences)

_PADDED_SLOTS = 1 << 24
"""Most slots of the padded scalars [B, T] of a micro-batch: 64 MiB for each float32 tensor that formulas see."""


@dataclass(frozen=True, slots=True)
class WorkModel:
    """Estimated work of one sequence of `T` tokens: `linear * T + full * T^2 / 2 + windowed * (T w - w^2 / 2)`.

    `w = min(T, window)`. The products are the pairs of tokens that attention looks at. In units of multiply-adds of a
    forward pass; only ratios matter.
    """

    linear: float = 1.0
    full: float = 0.0
    windowed: float = 0.0
    window: int = 1

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        tokens = lengths.astype(np.float64)
        seen = np.minimum(tokens, self.window)
        pairs = self.full * tokens * tokens / 2.0 + self.windowed * seen * (tokens - seen / 2.0)
        return self.linear * tokens + pairs

    @staticmethod
    def of(config: Any) -> WorkModel:
        """From a Hugging Face configuration; attributes that it lacks count as a plain dense decoder's."""
        hidden, layers = config.hidden_size, config.num_hidden_layers
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        projections = 2 * hidden * head_size * (heads + kv_heads)
        mlp = 3 * hidden * (getattr(config, "intermediate_size", None) or 4 * hidden)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
        sliding = kinds.count("sliding_attention")
        # Scores and values: 2 * heads * head_size multiply-adds for each pair.
        pair = 2.0 * heads * head_size
        return WorkModel(
            linear=float(layers * (projections + mlp) + hidden * config.vocab_size),
            full=pair * (layers - sliding),
            windowed=pair * sliding,
            window=getattr(config, "sliding_window", None) or 1,
        )


@dataclass(frozen=True, slots=True)
class Share(Generic[S_co]):
    """The part of one rank: `batch` holds its sequences in the order of its micro-batches.

    `counts` are the sequences of each micro-batch; all ranks have equally many, some may be empty.
    """

    batch: S_co
    counts: tuple[int, ...]

    def micro_batches(self: Share[WithTokens]) -> Iterator[WithTokens]:
        return self.batch.split(self.counts)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """`ranks[r][m]` are the indices int64 [n] of the sequences in micro-batch m of rank r; some may be empty."""

    ranks: tuple[tuple[np.ndarray, ...], ...]

    @property
    def micro_batches(self) -> int:
        """Micro-batches that every rank runs."""
        return len(self.ranks[0])

    @property
    def index(self) -> list[np.ndarray]:
        """For each rank the indices int64 [n] of its sequences, in the order of its share."""
        return [np.concatenate(parts) for parts in self.ranks]

    def shares(self, sequences: S) -> list[Share[S]]:
        """The parts of the planned `sequences`, one for each rank."""
        counts = [tuple(len(part) for part in parts) for parts in self.ranks]
        return [Share(sequences.select(index), sizes) for index, sizes in zip(self.index, counts, strict=True)]


@dataclass(slots=True)
class _Bin:
    """A micro-batch that is being filled."""

    room: int
    units: list[int] = field(default_factory=list)
    width: int = 0

    def takes(self, tokens: int, slots: int) -> bool:
        wide = max(self.width, slots) * (len(self.units) + 1)
        return not self.units or (tokens <= self.room and wide <= _PADDED_SLOTS)

    def add(self, unit: int, tokens: int, slots: int) -> None:
        self.units.append(unit)
        self.room -= tokens
        self.width = max(self.width, slots)


def plan_batch(sequences: Sequences | StoredSequences, ranks: int, token_budget: int, work: WorkModel) -> BatchPlan:
    """Deal every sequence to one micro-batch; a unit stays whole.

    A micro-batch has at most `token_budget` tokens, unless a single unit has more: that one trains alone. Micro-batches
    are filled longest unit first, each time the one with the least work so far, so that all have like work. Their
    number is a multiple of `ranks`: the first for which that fits, counted up from the fewest that can hold all tokens.
    """
    size = sequences.unit_size
    lengths = sequences.lengths.reshape(-1, size)
    tokens, longest = lengths.sum(-1), lengths.max(-1, initial=1)
    cost = work(lengths).sum(-1)
    # A unit above the budget fills one micro-batch, however long it is.
    rounds = max(1, -(-int(np.minimum(tokens, token_budget).sum()) // (token_budget * ranks)))
    while True:
        bins = _fill(tokens, longest * size, cost, rounds * ranks, token_budget)
        if bins is not None:
            return _dealt(bins, cost, ranks, size)
        # Not one by one: of many sequences near the budget, as many micro-batches are needed as there are sequences.
        rounds += 1 + rounds // 50


def _fill(
    tokens: np.ndarray, slots: np.ndarray, cost: np.ndarray, count: int, token_budget: int
) -> list[list[int]] | None:
    """Units of each of `count` micro-batches; None where they do not fit."""
    bins = [_Bin(token_budget) for _ in range(count)]
    shortest = int(tokens.min(initial=token_budget))
    least = [(0.0, number) for number in range(count)]
    for unit in np.argsort(-cost, kind="stable").tolist():
        full = []
        while least and not bins[least[0][1]].takes(int(tokens[unit]), int(slots[unit])):
            full.append(heapq.heappop(least))
        if not least:
            return None
        done, number = heapq.heappop(least)
        bins[number].add(unit, int(tokens[unit]), int(slots[unit]))
        # A micro-batch without room for any unit is never looked at again.
        open_again = [(done + float(cost[unit]), number), *full]
        for entry in open_again:
            if bins[entry[1]].room >= shortest:
                heapq.heappush(least, entry)
    return [one.units for one in bins]


def _dealt(bins: list[list[int]], cost: np.ndarray, ranks: int, size: int) -> BatchPlan:
    """The micro-batches in snake order of their work, so that the ranks' m-th ones and their sums are alike."""
    order = sorted(range(len(bins)), key=lambda number: -sum(cost[unit] for unit in bins[number]))
    dealt: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for place, number in enumerate(order):
        lap, column = divmod(place, ranks)
        rank = column if lap % 2 == 0 else ranks - 1 - column
        units = np.array(sorted(bins[number]), np.int64)
        dealt[rank].append((units[:, None] * size + np.arange(size)).reshape(-1))
    return BatchPlan(tuple(map(tuple, dealt)))
