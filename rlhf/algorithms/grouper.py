"""GROUPER, the group-wise SimPER of K-EXAONE and EXAONE 4.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from rlhf.advantages import group_min_max
from rlhf.algorithms.base import About, Needs, TokenLoss
from rlhf.algorithms.offline import OfflineAlgorithm, RowMetrics
from rlhf.algorithms.registry import register
from rlhf.batches import PreferenceBatch, Rows
from rlhf.batches.ragged import PreferenceSequences, group_sequences
from rlhf.losses.preference import probability_loss, sequence_logprob, sequence_probability
from rlhf.losses.sequence import spread_over_tokens
from rlhf.samples import PreferenceGroup, PreferenceUnit


@register("grouper")
class Grouper(OfflineAlgorithm):
    """`L = mean over groups of -(1/G) sum_i A_i exp((1/T_i) log pi(o_i))`, `A_i` the group's rewards scaled to [-1, 1].

    No reference, no ratio, no hyper-parameter: G and the rewards come with the data. With G = 2 it is exactly one half
    of SimPER. Degenerate: a group of equal rewards has zero advantages; it is dropped and counted before it is batched,
    so that it does not count in the mean.
    """

    about: ClassVar[About] = About(
        title="GROUPER",
        formula="L = mean over groups of -(1/G) sum_i A_i exp((1/T_i) log pi(o_i))\n"
        "A_i = 2 (r_i - min r) / (max r - min r) - 1 over the group",
        source="K-EXAONE, arXiv 2601.01739, sec. 3.5; EXAONE 4.5 (text, G = 4)",
        deviations=(
            "The z-score that the paper takes before the min-max scaling is left out: it changes nothing.",
            "Groups of different sizes may be mixed; each counts alike.",
        ),
        metrics={
            "preference/best_probability": "exp of the average log-prob of the completions with the best reward",
            "preference/worst_probability": "the same of those with the worst reward",
            "preference/best_logprob_per_token": "average log-prob in nats of the completions with the best reward",
            "preference/worst_logprob_per_token": "the same of those with the worst reward",
            "preference/advantage": "mean advantage; negative where most completions are nearer to the worst",
        },
    )

    @property
    def needs(self) -> Needs:
        return Needs(data="groups")

    def advantages(self, rewards: Tensor, group_index: Tensor) -> Tensor:
        """Advantages [N] in [-1, 1] of the completions with `rewards` [N]; `group_index` int64 [N]."""
        return group_min_max(rewards, group_index)

    def batch(self, units: Sequence[PreferenceUnit]) -> PreferenceSequences:
        groups = [unit for unit in units if isinstance(unit, PreferenceGroup)]
        assert len(groups) == len(units), "Grouper trains on groups"
        return group_sequences(groups, self.advantages, self.sample_weights)

    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        assert isinstance(batch, PreferenceBatch)
        loss = probability_loss(logprobs, batch.advantages, batch.loss_mask)
        return TokenLoss(spread_over_tokens(loss, batch.loss_mask), row_metrics=self._metrics(logprobs, batch))

    def _metrics(self, logprobs: Tensor, batch: PreferenceBatch) -> RowMetrics:
        present = batch.loss_mask.any(-1)
        # Scaled to exactly 1 and -1, and in no other way can a completion have these.
        best, worst = present & (batch.advantages == 1.0), present & (batch.advantages == -1.0)
        probability = sequence_probability(logprobs.detach(), batch.loss_mask)
        average = sequence_logprob(logprobs.detach(), batch.loss_mask, mean=True)
        return {
            "preference/best_probability": (probability, best),
            "preference/worst_probability": (probability, worst),
            "preference/best_logprob_per_token": (average, best),
            "preference/worst_logprob_per_token": (average, worst),
            "preference/advantage": (batch.advantages, present),
        }
