"""Batches: ragged from the rollout to the optimiser, padded only as the scalars that formulas see.

`ragged` has the records that travel, `packing` cuts them into micro-batches, `padded` shows one micro-batch to a loss.
"""

from rlhf.batches.padded import PairBatch, PreferenceBatch, Rows, SupervisedBatch, TrainBatch
from rlhf.batches.ragged import ScoredSamples

__all__ = ["PairBatch", "PreferenceBatch", "Rows", "ScoredSamples", "SupervisedBatch", "TrainBatch"]
