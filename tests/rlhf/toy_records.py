"""Flat records of every type, filled at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from rlhf.batches.ragged import (
    PairSequences,
    PreferenceSequences,
    RolloutSequences,
    Sequences,
    SupervisedSequences,
    TrainSequences,
)

S = TypeVar("S", bound=Sequences)

KINDS: list[type[Sequences]] = [
    Sequences,
    RolloutSequences,
    TrainSequences,
    SupervisedSequences,
    PreferenceSequences,
    PairSequences,
]


def record(kind: type[S], lengths: Sequence[int], seed: int = 0) -> S:
    """Sequences of `lengths`; token t of the record is `t`, so that every token can be found again."""
    random = np.random.default_rng(seed)
    tokens, count = sum(lengths), len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    mask = random.random(tokens) < 0.6
    mask[offsets[:-1]] = False
    columns: dict[str, Any] = {
        "token_ids": np.arange(tokens, dtype=np.int32),
        "loss_mask": mask,
        "offsets": offsets,
        "sample_index": np.arange(count),
        "staleness": random.integers(0, 3, count),
    }
    for item in fields(kind):
        size = tokens if item.name in kind.per_token else count
        columns.setdefault(item.name, random.standard_normal(size).astype(np.float32))
    return kind(**{item.name: columns[item.name] for item in fields(kind)})


def pieces(sequences: Sequences) -> list[dict[str, list[Any]]]:
    """Each sequence as plain lists by field, cut by a loop over the tokens; an empty column stays empty."""
    found = []
    for number in range(len(sequences.offsets) - 1):
        start, stop = int(sequences.offsets[number]), int(sequences.offsets[number + 1])
        piece = {}
        for item in fields(sequences):
            column = getattr(sequences, item.name).tolist()
            if item.name in sequences.per_token:
                piece[item.name] = [column[t] for t in range(start, stop)] if column else []
            elif item.name != "offsets":
                piece[item.name] = [column[number]]
        found.append(piece)
    return found
