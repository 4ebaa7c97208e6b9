"""SimPER, the preference optimisation of EXAONE 4.0."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rlhf.algorithms.base import About, Needs, TokenLoss
from rlhf.algorithms.offline import PAIR_METRICS, PairAlgorithm, RowMetrics
from rlhf.algorithms.registry import register
from rlhf.batches import PairBatch, Rows
from rlhf.losses.preference import probability_loss, sequence_probability
from rlhf.losses.sequence import spread_over_tokens


@register("simper")
class Simper(PairAlgorithm):
    """`L = mean over pairs of -exp((1/T_w) log pi(chosen)) + exp((1/T_l) log pi(rejected))`.

    No reference and no hyper-parameter. Degenerate: a completion whose tokens are improbable on average has almost no
    gradient, as its probability scales it; an empty completion counts in the mean and has none.
    """

    about: ClassVar[About] = About(
        title="SimPER",
        formula="L = mean over pairs of -exp((1/T_w) log pi(chosen)) + exp((1/T_l) log pi(rejected))",
        source="SimPER, arXiv 2502.00883 (1 epoch, cosine, warm-up 0.1, batch 128, learning rate 3e-7 to 1e-6); "
        "EXAONE 4.0, arXiv 2507.11407, trains with it twice after RL",
        metrics=PAIR_METRICS
        | {
            "preference/margin": "probability of the chosen less that of the rejected completion",
            "preference/accuracy": "share of pairs whose chosen completion is the more probable",
            "preference/chosen_probability": "exp of the average log-prob of the chosen completion",
            "preference/rejected_probability": "the same of the rejected completion",
        },
    )

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs")

    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        assert isinstance(batch, PairBatch)
        # A mean over pairs is twice a mean over their rows.
        loss = 2.0 * probability_loss(logprobs, batch.advantages, batch.loss_mask)
        return TokenLoss(spread_over_tokens(loss, batch.loss_mask), row_metrics=self._metrics(logprobs, batch))

    def _metrics(self, logprobs: Tensor, batch: PairBatch) -> RowMetrics:
        probability = sequence_probability(logprobs.detach(), batch.loss_mask)
        metrics = self.pair_metrics(logprobs, batch, probability[0::2] - probability[1::2])
        for side in ("chosen", "rejected"):
            metrics[f"preference/{side}_probability"] = (probability, metrics[f"preference/{side}_logprob"][1])
        return metrics
