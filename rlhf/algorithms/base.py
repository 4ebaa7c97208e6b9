"""What an algorithm is: hyper-parameters, what it needs, advantages, an unreduced token loss and a reduction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from rlhf.batches import Rows
from rlhf.losses.reduce import Reduction, sample_weights

Data = Literal["demonstrations", "rollouts", "pairs", "groups"]
"""What an algorithm trains on: demonstrations (SFT), fresh rollouts (RL), or stored preference pairs or groups."""


class Needs(NamedTuple):
    """What a run must provide for an algorithm. The learner and the rules ask this, never the algorithm's name.

    `group_baseline`: at least two samples a prompt. `reference_logprobs`: of the weights at the start of the stage.
    `kl_in_reward`: the KL of each sample to the reference, before advantages are computed. `importance_ratio`: compares
    learner and engine probabilities, which the engine must give over the whole vocabulary. `on_policy`: its loss has no
    importance ratio, so samples must be on-policy.
    """

    data: Data
    group_baseline: bool = False
    reference_logprobs: bool = False
    kl_in_reward: bool = False
    importance_ratio: bool = False
    on_policy: bool = False

    @property
    def rollouts(self) -> bool:
        return self.data == "rollouts"


class About(NamedTuple):
    """What the documentation page says of an algorithm besides its fields; see `rlhf.algorithms.page`.

    `metrics`: name -> meaning of what it logs beyond the metrics that every algorithm has.
    """

    title: str
    formula: str
    source: str
    deviations: tuple[str, ...] = ()
    metrics: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """`loss` [B, T], unreduced, with gradient; the rest without, for the log.

    `metrics` name -> [B, T], averaged over the loss mask; `row_metrics` name -> (values [B], bool [B] of the rows that
    have one), averaged over those rows.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    row_metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Algorithm(BaseModel):
    """Base of all algorithms. Fields are the hyper-parameters; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: ClassVar[About]

    reduction: Annotated[Reduction, Field(description="how token losses become one number")]
    fixed_length: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="C of the reduction fixed_length, in tokens"
    )

    @model_validator(mode="after")
    def _fixed_length_goes_with_its_reduction(self) -> Algorithm:
        if (self.reduction == "fixed_length") != (self.fixed_length is not None):
            raise ValueError(
                "fixed_length must be set with reduction = fixed_length, and only with it. It is the constant that "
                "token losses are divided by. Set both or neither"
            )
        return self

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a run must provide, for these hyper-parameters."""

    @abstractmethod
    def token_loss(self, logprobs: Tensor, batch: Rows) -> TokenLoss:
        """Loss of every token from the policy's `logprobs` [B, T]. Gradient flows through `logprobs` only."""

    def sample_weights(self, trained_tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights [N] of the token losses of each sample of an optimiser step, from its trained tokens [N]."""
        return sample_weights(trained_tokens, self.reduction, fixed_length=self.fixed_length, dtype=dtype)
