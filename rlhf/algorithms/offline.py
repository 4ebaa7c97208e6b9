"""What the algorithms over stored completions share: units to batches, and the log-probs people watch.

A loss here is one of whole completions. It is spread over their tokens, so that `sequence_sum` gives its mean over the
completions of the optimiser step; another reduction would be another formula, and is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from rlhf.algorithms.base import Algorithm
from rlhf.batches import PairBatch
from rlhf.batches.ragged import PairSequences, PreferenceSequences, pair_sequences
from rlhf.losses.preference import sequence_logprob
from rlhf.samples import PreferencePair, PreferenceUnit

RowMetrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (values [B], bool [B] of the rows that have one)."""

PAIR_METRICS = {
    "preference/chosen_logprob": "log-prob of the chosen completion in nats, summed over its tokens",
    "preference/rejected_logprob": "the same of the rejected completion",
    "preference/chosen_logprob_per_token": "log-prob of the chosen completion in nats, averaged over its tokens",
    "preference/rejected_logprob_per_token": "the same of the rejected completion",
}


class OfflineAlgorithm(Algorithm):
    """An algorithm over `PreferencePair`s or `PreferenceGroup`s."""

    reduction: Annotated[Literal["sequence_sum"], Field(description="the loss is a mean over completions")] = (
        "sequence_sum"
    )

    @abstractmethod
    def batch(self, units: Sequence[PreferenceUnit]) -> PreferenceSequences:
        """One optimiser step of `units`, in the order of `unit_sequences`, without reference log-probs."""


class PairAlgorithm(OfflineAlgorithm):
    """An algorithm over chosen and rejected completions."""

    def batch(self, units: Sequence[PreferenceUnit]) -> PairSequences:
        pairs = [unit for unit in units if isinstance(unit, PreferencePair)]
        assert len(pairs) == len(units), f"{type(self).__name__} trains on pairs"
        return pair_sequences(pairs, self.sample_weights)

    def pair_metrics(self, logprobs: Tensor, batch: PairBatch, margin: Tensor) -> RowMetrics:
        """`PAIR_METRICS`, and the mean `margin` [pairs] and how often it is positive; only non-empty completions count.

        The metrics of a pair stand on the row of its chosen completion.
        """
        present = batch.loss_mask.any(-1)
        chosen, rejected = present.clone(), present.clone()
        chosen[1::2], rejected[0::2] = False, False
        total = sequence_logprob(logprobs.detach(), batch.loss_mask, mean=False)
        average = sequence_logprob(logprobs.detach(), batch.loss_mask, mean=True)
        margins, pairs = margin.detach().repeat_interleave(2), chosen & present.roll(-1)
        return {
            "preference/chosen_logprob": (total, chosen),
            "preference/rejected_logprob": (total, rejected),
            "preference/chosen_logprob_per_token": (average, chosen),
            "preference/rejected_logprob_per_token": (average, rejected),
            "preference/margin": (margins, pairs),
            "preference/accuracy": ((margins > 0).to(margins.dtype), pairs),
        }
