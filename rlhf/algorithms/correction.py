"""Corrections of the sampler's mismatch as a part of any online algorithm; formulas in `rlhf.losses.correction`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rlhf.batches import TrainBatch
from rlhf.losses import correction

Cap = Annotated[float, Field(ge=1.0, allow_inf_nan=False)]


class CorrectionPart(BaseModel):
    """Detached weights [B, T] that multiply the policy loss; a masked token (weight 0) stays in the denominator."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Any

    @abstractmethod
    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor | None:
        """[B, T], or None where nothing is corrected."""

    def metrics(self, weights: Tensor | None, batch: TrainBatch) -> dict[str, Tensor]:
        """The raw ratio before any truncation, and what was masked."""
        ratio = torch.exp(batch.proximal_logprobs - batch.rollout_logprobs)
        masked = torch.zeros_like(ratio) if weights is None else (weights == 0).to(ratio.dtype)
        return {"mismatch/ratio": ratio, "mismatch/masked_fraction": masked}


class NoCorrection(CorrectionPart):
    """The gap between engine and learner is left alone."""

    kind: Literal["none"]

    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor | None:
        return None


class TokenTis(CorrectionPart):
    """Truncated importance sampling, token by token: `min(k, cap)`."""

    kind: Literal["tis_token"]
    cap: Annotated[Cap, Field(description="largest weight of a token")] = 2.0

    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor:
        return correction.tis_token(batch.proximal_logprobs, batch.rollout_logprobs, cap=self.cap)


class SequenceTis(CorrectionPart):
    """Truncated importance sampling by the product over the sequence: `min(prod k, cap)`."""

    kind: Literal["tis_sequence"]
    cap: Annotated[Cap, Field(description="largest weight of a sequence")] = 2.0

    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor:
        return correction.tis_sequence(batch.proximal_logprobs, batch.rollout_logprobs, batch.loss_mask, cap=self.cap)


class IcePop(CorrectionPart):
    """`k` where `low <= k <= high`, else 0 (2510.18855; EXAONE 4.5)."""

    kind: Literal["icepop"]
    low: Annotated[float, Field(ge=0.0, le=1.0, description="alpha (paper: 0.5)")] = 0.5
    high: Annotated[Cap, Field(description="beta (paper: 5)")] = 5.0

    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor:
        return correction.icepop(batch.proximal_logprobs, batch.rollout_logprobs, low=self.low, high=self.high)


class SequenceMask(CorrectionPart):
    """The product over the sequence, and nothing where that is above `cap`."""

    kind: Literal["sequence_mask"]
    cap: Annotated[Cap, Field(description="sequences with a larger product are masked")] = 2.0

    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor:
        return correction.sequence_mask(batch.proximal_logprobs, batch.rollout_logprobs, batch.loss_mask, cap=self.cap)


class GeometricMask(CorrectionPart):
    """Sequences whose geometric mean of `k` leaves the band `[low, high]` are masked."""

    kind: Literal["geometric_mask"]
    low: Annotated[float, Field(gt=0.0, le=1.0, description="of the geometric mean of k")] = 0.999
    high: Annotated[Cap, Field(description="of the geometric mean of k")] = 1.001

    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor:
        return correction.geometric_mask(
            batch.proximal_logprobs, batch.rollout_logprobs, batch.loss_mask, low=self.low, high=self.high
        )


class OffPolicySequenceMask(CorrectionPart):
    """Sequences with a negative advantage that the policy has moved away from by more than `delta` nats a token."""

    kind: Literal["off_policy_sequence_mask"]
    delta: Annotated[float, Field(gt=0.0, allow_inf_nan=False, description="nats a token, on average")] = 0.1

    def weights(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> Tensor:
        return correction.off_policy_sequence_mask(
            logprobs, batch.proximal_logprobs, advantages, batch.loss_mask, delta=self.delta
        )


Correction = Annotated[
    NoCorrection | TokenTis | SequenceTis | IcePop | SequenceMask | GeometricMask | OffPolicySequenceMask,
    Field(discriminator="kind"),
]
