"""The KL to the reference policy as a part of any online algorithm; formulas in `rlhf.losses.kl`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from rlhf.batches import TrainBatch
from rlhf.losses.kl import k1, k2, k3, k3_weighted, kl_to_go
from rlhf.losses.policy import per_token

Estimator = Literal["k1", "k2", "k3", "k3_weighted"]
Placement = Literal["loss", "reward", "reward_to_go"]


class Kl(BaseModel):
    """`coefficient` (beta) times an estimate of KL(policy || reference), and where it enters.

    `reward`: the sum over the sequence is taken off the reward, before the baseline. `reward_to_go`: what is still to
    come after each token is taken off its advantage, after normalisation (AGAPO). `loss`: added to every token's loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    coefficient: Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="beta; 0: no KL, no reference")] = 0.0
    estimator: Annotated[Estimator, Field(description="of the KL from u = log(pi_theta / pi_ref)")] = "k3"
    placement: Annotated[Placement, Field(description="where it enters")] = "loss"

    @model_validator(mode="after")
    def _has_the_gradient_of_a_kl(self) -> Kl:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator must not be k1 with placement loss. Its gradient there is zero in expectation. Use "
                "placement reward or reward_to_go, or estimator k2, k3 or k3_weighted"
            )
        if self.placement != "loss" and self.estimator != "k1":
            raise ValueError(
                f"estimator must be k1 with placement {self.placement}. Only the plain log-ratio, summed over the "
                "sequence, has the gradient of the KL there. Use estimator k1"
            )
        return self

    @property
    def enters_reward(self) -> bool:
        return self.coefficient > 0 and self.placement == "reward"

    def in_reward(self, rewards: Tensor, kl_nats: Tensor) -> Tensor:
        """Rewards [N], less the KL `kl_nats` [N] of each sample under the weights at the start of the update."""
        return rewards - self.coefficient * kl_nats if self.enters_reward else rewards

    def to_go(self, logprobs: Tensor, batch: TrainBatch) -> Tensor:
        """Advantages: [B] as they are, or [B, T] less the KL from each token to the end."""
        if not self.coefficient or self.placement != "reward_to_go":
            return batch.advantages
        ahead = kl_to_go(logprobs, batch.reference_logprobs, batch.loss_mask)
        return per_token(batch.advantages, ahead) - self.coefficient * ahead

    def loss(self, logprobs: Tensor, batch: TrainBatch) -> Tensor | None:
        """The term [B, T] to be added to the loss; None without one."""
        if not self.coefficient or self.placement != "loss":
            return None
        reference = batch.reference_logprobs
        if self.estimator == "k3_weighted":
            return self.coefficient * k3_weighted(logprobs, batch.proximal_logprobs, reference)
        return self.coefficient * {"k2": k2, "k3": k3}[self.estimator](logprobs, reference)

    def metrics(self, logprobs: Tensor, batch: TrainBatch) -> dict[str, Tensor]:
        return {"policy/kl_nats": k1(logprobs.detach(), batch.reference_logprobs)} if self.coefficient else {}
