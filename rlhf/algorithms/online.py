"""What the algorithms over fresh rollouts share: filter, KL to the reference, and correction of the sampler's mismatch.

rewards --(KL in the reward)--> baseline --> advantages --(KL to go)--> policy loss --> x correction --> + KL loss
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from rlhf.algorithms.base import Algorithm, Needs, TokenLoss
from rlhf.algorithms.correction import Correction, NoCorrection
from rlhf.algorithms.kl import Kl
from rlhf.batches import Rows, ScoredSamples, TrainBatch
from rlhf.selection import GroupFilter


class OnlineAlgorithm(Algorithm):
    """An algorithm says its baseline (`group_advantages`) and its policy loss; this class puts the parts together."""

    group_baseline: ClassVar[bool] = True
    has_policy_ratio: ClassVar[bool] = True
    """Its loss holds pi_theta / pi_prox, so that several updates on the samples of one step are sound."""
    token_level: ClassVar[bool] = True
    """Tokens of one sequence may have different advantages and weights."""
    own_correction: ClassVar[bool] = False
    """Its loss already weighs by the gap to the engine."""

    kl: Kl = Field(default=Kl(), description="KL to the policy at the start of the stage")
    correction: Correction = Field(
        default=NoCorrection(kind="none"), description="of the gap between engine and learner"
    )
    group_filter: Annotated[GroupFilter, Field(description="which groups train; the others are refilled")] = "none"

    @property
    def needs(self) -> Needs:
        return Needs(
            data="rollouts",
            group_baseline=self.group_baseline,
            reference_logprobs=self.kl.coefficient > 0,
            kl_in_reward=self.kl.enters_reward,
            importance_ratio=self.own_correction or self.correction.kind != "none",
            on_policy=not (self.has_policy_ratio or self.own_correction),
        )

    @abstractmethod
    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        """Advantages [N] of all samples of one rollout step from their `rewards` [N], KL already in them if asked."""

    @abstractmethod
    def policy_loss(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> TokenLoss:
        """The loss [B, T] of the policy gradient; `advantages` [B], or [B, T] where `token_level`."""

    def advantages(self, batch: ScoredSamples, kl_nats: Tensor) -> Tensor:
        """Advantages [N] of all samples of one rollout step.

        `kl_nats` [N] is the KL of each sample to the reference where `needs.kl_in_reward`; else it is not looked at.
        """
        return self.group_advantages(self.kl.in_reward(batch.rewards, kl_nats), batch)

    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        assert isinstance(batch, TrainBatch)
        advantages = self.kl.to_go(logprobs, batch)
        policy = self.policy_loss(logprobs, batch, advantages)
        weights = self.correction.weights(logprobs, batch, advantages)
        # A weight of exactly 0 must also silence a token whose own loss is infinite.
        corrected = policy.loss if weights is None else (weights * policy.loss).masked_fill(weights == 0, 0.0)
        penalty = self.kl.loss(logprobs, batch)
        metrics = {**policy.metrics, **self.correction.metrics(weights, batch), **self.kl.metrics(logprobs, batch)}
        # A clip or a mask would hide an infinite log-prob; 0 * inf is NaN, which stops the run.
        broken = 0.0 * (batch.proximal_logprobs + batch.rollout_logprobs).detach()
        loss = corrected + broken if penalty is None else corrected + penalty + broken
        return TokenLoss(loss, metrics, policy.row_metrics)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> OnlineAlgorithm:
        name = type(self).__name__
        if self.own_correction and self.correction.kind != "none":
            raise ValueError(
                f"correction must be none with {name}. Its loss already weighs by the ratio of learner and engine; a "
                "second correction would count the same gap twice. Leave correction out"
            )
        if not self.token_level and self.kl.coefficient and self.kl.placement == "reward_to_go":
            raise ValueError(
                f"kl.placement must not be reward_to_go with {name}. It gives every token an advantage of its own, "
                "while this algorithm has one ratio for a whole sequence. Use placement reward"
            )
        if not self.token_level and self.correction.kind in ("icepop", "tis_token"):
            raise ValueError(
                f"correction.kind must not be {self.correction.kind} with {name}. It weighs tokens one by one, while "
                "this algorithm has one ratio for a whole sequence. Use tis_sequence, sequence_mask or geometric_mask"
            )
        return self
