"""One rank's learner: log-probs, losses and optimiser steps over its share of each batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.algorithms import Algorithm
from rlhf.algorithms.base import TokenLoss
from rlhf.batches.packing import Share
from rlhf.batches.padded import MicroBatch, TrainBatch, padded, spread
from rlhf.batches.ragged import (
    NO_TOKENS,
    OptimiserStep,
    RolloutSequences,
    Sequences,
    TrainSequences,
    train_sequences,
)
from rlhf.config import OptimizerConfig
from rlhf.errors import NonFiniteError
from rlhf.metrics import DeviceMetrics, MetricSums
from rlhf.mismatch import mismatch_gaps
from rlhf.training.schedule import learning_rate
from rlhf.training.token_model import Pack


class Model(Protocol):
    """A causal language model on `device`."""

    device: torch.device

    def forward(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-probs [M], entropy [M]) of the pack's trained tokens under `softmax(logits / temperature)`."""
        ...


class TrainingEngine(Model, Protocol):
    """The part of DeepSpeed that the learner needs; see `DeepSpeedEngine`."""

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, learning_rate: float) -> float: ...

    def sum_over_ranks(self, value: Tensor) -> float: ...


@dataclass(frozen=True, slots=True)
class RankReport:
    """One optimiser step as one rank saw it: `loss` and `grad_norm` are global, tokens and metrics this rank's."""

    loss: float
    grad_norm: float
    learning_rate: float
    trained_tokens: int
    metrics: MetricSums


class Learner:
    """Runs an algorithm's loss on a training engine. It asks `algorithm.needs`, never the algorithm's name."""

    def __init__(
        self,
        engine: TrainingEngine,
        algorithm: Algorithm,
        optimizer: OptimizerConfig,
        total_steps: int,
        temperature: float,
        first_step: int = 0,
    ) -> None:
        """`first_step` optimiser steps of the stage are behind `engine` already."""
        self.engine = engine
        self.algorithm = algorithm
        self._optimizer = optimizer
        self._total_steps = total_steps
        # Stored completions are judged as they are; fresh ones under the distribution they were sampled from.
        self._temperature = temperature if algorithm.needs.rollouts else 1.0
        self._step = first_step

    @torch.no_grad()
    def logprobs(self, share: Share[Sequences], model: Model | None = None) -> np.ndarray:
        """Log-probs float32 [S] of this rank's tokens, zero off the loss mask: of the policy, or of `model`."""
        chosen, found = model or self.engine, []
        for sequences in share.micro_batches():
            values, _ = chosen.forward(Pack.of(sequences, chosen.device), self._temperature)
            found.append(values.float())
        out = np.zeros(share.batch.token_ids.shape, np.float32)
        out[share.batch.loss_mask] = torch.cat(found).cpu().numpy()
        return out

    def update(self, share: Share[OptimiserStep]) -> RankReport:
        """One optimiser step over this rank's sequences, whose `weights` are already those of the global batch."""
        metrics = DeviceMetrics()
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        last = len(share.counts) - 1
        for number, sequences in enumerate(share.micro_batches()):
            loss = self._loss(sequences, metrics)
            self.engine.backward(loss, last=number == last)
            total += loss.detach()
        loss_of_all_ranks = self.engine.sum_over_ranks(total)
        rate = learning_rate(self._step, self._total_steps, self._optimizer)
        # All ranks see the same sum and stop together, before the optimiser touches the weights.
        self._require_finite("loss", loss_of_all_ranks)
        grad_norm = self.engine.step(rate)
        self._require_finite("gradient norm", grad_norm)
        self._step += 1
        trained = int(share.batch.loss_mask.sum())
        return RankReport(loss_of_all_ranks, grad_norm, rate, trained, metrics.sums())

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{what} = {value} at optimiser step {self._step}: must be finite. The run stops, with the "
                "weights as they were before it. Lower the learning rate, lengthen the warm-up, or look at the batch."
            )

    def _loss(self, sequences: OptimiserStep, metrics: DeviceMetrics) -> Tensor:
        pack = Pack.of(sequences, self.engine.device)
        trained, entropy = self.engine.forward(pack, self._temperature)
        if not len(sequences):
            return trained.sum()
        rows = padded(sequences, trained)
        logprobs = spread(trained, rows.loss_mask)
        token_loss = self.algorithm.token_loss(logprobs, rows)
        self._measure(metrics, rows, logprobs, spread(entropy, rows.loss_mask), token_loss)
        # What an algorithm computes off the mask means nothing and may be inf or NaN: select, never multiply by zero.
        # A loss that is bounded at a log-prob of -inf would hide it; 0 * inf is NaN, which stops the run.
        checked = token_loss.loss + 0.0 * logprobs.detach()
        masked = torch.where(rows.loss_mask, checked, torch.zeros_like(checked))
        return (masked * rows.token_weights).sum()

    @staticmethod
    def _measure(
        metrics: DeviceMetrics, rows: MicroBatch, logprobs: Tensor, entropy: Tensor, token_loss: TokenLoss
    ) -> None:
        everywhere = {"policy/entropy_nats": entropy, "policy/nll_nats": -logprobs, **token_loss.metrics}
        if isinstance(rows, TrainBatch):
            gaps = mismatch_gaps(rows)
            for values, mask in gaps.values():
                metrics.add(values, mask)
        metrics.add(everywhere, rows.loss_mask)
        metrics.add_rows(token_loss.row_metrics, rows.loss_mask.any(-1))


class OnlineLearner:
    """Holds the sequences of a rollout step from its annotation to its last update."""

    def __init__(self, learner: Learner, reference: Model | None) -> None:
        """`reference` is the frozen model, where the algorithm needs its log-probs."""
        self._learner = learner
        self._reference = reference
        self._held: list[Share[TrainSequences]] = []

    def hold(self, shares: list[Share[RolloutSequences]]) -> list[np.ndarray]:
        """Take this rank's sequences of each optimiser step of a rollout step and annotate them.

        Proximal log-probs are computed only where the policy's own will not do: with several optimiser steps, and for
        a KL in the reward, which is needed before any update. Returns that KL to the reference in nats for each
        sequence, float32 [n], one array for each optimiser step; zeros where the algorithm does not ask for it.
        """
        needs = self._learner.algorithm.needs
        early = len(shares) > 1 or needs.kl_in_reward
        self._held = [self._annotated(share, early) for share in shares]
        return [_kl(share.batch, asked=needs.kl_in_reward) for share in self._held]

    def update(self, number: int, advantages: np.ndarray, weights: np.ndarray) -> RankReport:
        """Optimiser step `number` of the held rollout step; `advantages` and `weights` float32 [n] by sequence."""
        share = self._held[number]
        batch = replace(share.batch, advantages=advantages, weights=weights)
        return self._learner.update(Share(batch, share.counts))

    def held(self, number: int) -> TrainSequences:
        """The sequences of optimiser step `number`, to be looked at after it failed."""
        return self._held[number].batch

    def _annotated(self, share: Share[RolloutSequences], early: bool) -> Share[TrainSequences]:
        none = np.zeros(len(share.batch), np.float32)
        proximal = self._learner.logprobs(share) if early else NO_TOKENS
        reference = NO_TOKENS if self._reference is None else self._learner.logprobs(share, self._reference)
        batch = train_sequences(share.batch, none, none, proximal_logprobs=proximal, reference_logprobs=reference)
        return Share(batch, share.counts)


def _kl(batch: TrainSequences, *, asked: bool) -> np.ndarray:
    """[n]: the sum of proximal minus reference log-probs over the trained tokens of each sequence."""
    if not asked or not len(batch):
        return np.zeros(len(batch), np.float32)
    # Both are zero off the loss mask.
    gap = batch.proximal_logprobs.astype(np.float64) - batch.reference_logprobs
    return np.add.reduceat(gap, batch.offsets[:-1]).astype(np.float32)
