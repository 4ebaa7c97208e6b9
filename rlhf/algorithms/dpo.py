"""DPO, with IPO's loss, length normalisation and an auxiliary likelihood term as options."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rlhf.algorithms.base import About, Needs, TokenLoss
from rlhf.algorithms.offline import PAIR_METRICS, PairAlgorithm
from rlhf.algorithms.registry import register
from rlhf.batches import PairBatch, Rows
from rlhf.losses.preference import dpo, ipo, pair_margin, sequence_logprob, spread_over_pairs


@register("dpo")
class Dpo(PairAlgorithm):
    """`L = mean over pairs of -(1 - e) log sigmoid(beta Delta) - e log sigmoid(-beta Delta) + alpha NLL(chosen)`.

    `Delta = [log pi/pi_ref](chosen) - [log pi/pi_ref](rejected)` with token sums, or per-token averages. Degenerate:
    Delta is 0 and the loss log 2 for every pair at the first step, where the policy is the reference; two equal
    completions never have a gradient but that of the NLL.
    """

    about: ClassVar[About] = About(
        title="DPO",
        formula="L = mean over pairs of -(1 - e) log sigmoid(beta Delta) - e log sigmoid(-beta Delta) + alpha NLL\n"
        "Delta = [log pi/pi_ref](chosen) - [log pi/pi_ref](rejected),  NLL = -(1/T_w) log pi(chosen)\n"
        "loss = ipo: (Delta - 1 / (2 beta))^2 in place of the first two terms",
        source="DPO, arXiv 2305.18290; IPO, arXiv 2310.12036; EXAONE 4.5 uses DPO with beta 0.1 for vision tasks",
        deviations=(
            "IPO takes Delta of per-token averages, as TRL does; the paper and OpenRLHF take token sums.",
            "The reference is the policy at the start of the stage, computed once over all pairs.",
        ),
        metrics=PAIR_METRICS
        | {
            "preference/margin": "Delta in nats, as the loss takes it (sums, or per-token averages)",
            "preference/accuracy": "share of pairs with Delta > 0; 0 before the first update, where Delta is 0",
        },
    )

    beta: Annotated[float, Field(gt=0.0, allow_inf_nan=False, description="DPO 2305.18290 and EXAONE 4.5: 0.1")] = 0.1
    label_smoothing: Annotated[
        float, Field(ge=0.0, lt=0.5, description="e of cDPO, the share of flipped labels; 0 is DPO itself")
    ] = 0.0
    loss: Annotated[Literal["sigmoid", "ipo"], Field(description="sigmoid is DPO itself")] = "sigmoid"
    length_normalised: Annotated[
        bool, Field(description="Delta of per-token averages inside the sigmoid; false is DPO itself")
    ] = False
    nll_weight: Annotated[
        float,
        Field(ge=0.0, allow_inf_nan=False, description="alpha of the NLL; 0 is DPO itself, 2404.19733: 1"),
    ] = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs", reference_logprobs=True)

    @model_validator(mode="after")
    def _options_fit_the_loss(self) -> Dpo:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                "label_smoothing must be 0 with loss ipo. It mixes the two signs of a sigmoid, and ipo has none. Use "
                "loss sigmoid, or leave label_smoothing out"
            )
        if self.loss == "ipo" and self.length_normalised:
            raise ValueError(
                "length_normalised must be false with loss ipo. It is always of per-token averages. Leave it out"
            )
        return self

    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        assert isinstance(batch, PairBatch)
        mask, mean = batch.loss_mask, self.length_normalised or self.loss == "ipo"
        margin = pair_margin(logprobs, batch.reference_logprobs, mask, mean=mean)
        loss = self._preference(margin)
        if self.nll_weight:
            loss = loss - self.nll_weight * sequence_logprob(logprobs, mask, mean=True)[0::2]
        return TokenLoss(spread_over_pairs(loss, mask), row_metrics=self.pair_metrics(logprobs, batch, margin))

    def _preference(self, margin: Tensor) -> Tensor:
        if self.loss == "ipo":
            return ipo(margin, beta=self.beta)
        return dpo(margin, beta=self.beta, label_smoothing=self.label_smoothing)
