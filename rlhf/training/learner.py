"""One rank's learner: log-probs, losses and optimiser steps over its share of each batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from rlhf.algorithms import Algorithm
from rlhf.batches import Batch, Rows
from rlhf.config import OptimizerConfig
from rlhf.errors import NonFiniteError
from rlhf.losses.logprobs import token_entropy, token_logprobs
from rlhf.metrics import TokenMetrics
from rlhf.training.batching import micro_batches
from rlhf.training.schedule import learning_rate

R = TypeVar("R", bound=Rows)


class Model(Protocol):
    """A causal language model: tokens [B, T] padded on the right, `lengths` [B] -> logits [B, T, V]."""

    def logits(self, token_ids: Tensor, lengths: Tensor) -> Tensor: ...


class TrainingEngine(Model, Protocol):
    """What the learner needs of DeepSpeed; see `DeepSpeedEngine`."""

    device: torch.device

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, learning_rate: float) -> float: ...

    def sum_over_ranks(self, value: float) -> float: ...


@dataclass(frozen=True, slots=True)
class RankReport:
    """One optimiser step as one rank saw it: `loss` and `grad_norm` are global, tokens and metrics this rank's."""

    loss: float
    grad_norm: float
    learning_rate: float
    trained_tokens: int
    metrics: TokenMetrics


class Learner:
    """Runs an algorithm's loss on a training engine. It asks `algorithm.needs`, never the algorithm's name."""

    def __init__(
        self,
        engine: TrainingEngine,
        algorithm: Algorithm,
        optimizer: OptimizerConfig,
        total_steps: int,
        micro_batch_size: int,
        temperature: float,
    ) -> None:
        self.engine = engine
        self.algorithm = algorithm
        self._optimizer = optimizer
        self._total_steps = total_steps
        self._micro_batch_size = micro_batch_size
        # Stored completions are judged as they are; fresh ones under the distribution they were sampled from.
        self._temperature = temperature if algorithm.needs.rollouts else 1.0
        self._step = 0

    @torch.no_grad()
    def logprobs(self, batch: Rows, micro_batches_run: int, model: Model | None = None) -> Tensor:
        """Log-probs float32 [N, T] of this rank's rows, zero off the loss mask: of the policy, or of `model`."""
        out = torch.zeros(batch.token_ids.shape)
        for index, rows in micro_batches(batch, self._micro_batch_size, micro_batches_run):
            logits = (model or self.engine).logits(rows.token_ids, rows.lengths)
            token_ids, mask = rows.token_ids.to(logits.device), rows.loss_mask.to(logits.device)
            values = token_logprobs(logits, token_ids, mask, temperature=self._temperature)
            if len(index):
                out[index, : values.shape[1]] = values.cpu()
        return out

    def update(self, batch: Batch, micro_batches_run: int) -> RankReport:
        """One optimiser step over this rank's rows of a global batch whose `token_weights` are already global."""
        metrics, total = TokenMetrics(), 0.0
        parts = micro_batches(batch, self._micro_batch_size, micro_batches_run)
        for number, (_, rows) in enumerate(parts):
            loss = self._loss(rows, metrics)
            self.engine.backward(loss, last=number == micro_batches_run - 1)
            total += loss.item()
        total = self.engine.sum_over_ranks(total)
        rate = learning_rate(self._step, self._total_steps, self._optimizer)
        # All ranks see the same sum and stop together, before the optimiser touches the weights.
        self._require_finite("loss", total)
        grad_norm = self.engine.step(rate)
        self._require_finite("gradient norm", grad_norm)
        self._step += 1
        return RankReport(total, grad_norm, rate, int(batch.loss_mask.sum()), metrics)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{what} = {value} at optimiser step {self._step}: must be finite. The run stops and keeps the last "
                "saved policy. Lower the learning rate, lengthen the warm-up, or look at the dumped batch."
            )

    def _loss(self, rows: Batch, metrics: TokenMetrics) -> Tensor:
        rows = _to(rows, self.engine.device)
        logits = self.engine.logits(rows.token_ids, rows.lengths)
        tokens = (rows.token_ids, rows.loss_mask)
        logprobs = token_logprobs(logits, *tokens, temperature=self._temperature)
        token_loss = self.algorithm.token_loss(logprobs, rows)
        metrics.add(
            "policy/entropy_nats", token_entropy(logits, *tokens, temperature=self._temperature), rows.loss_mask
        )
        metrics.add("policy/nll_nats", -logprobs, rows.loss_mask)
        for name, values in token_loss.metrics.items():
            metrics.add(name, values, rows.loss_mask)
        has_tokens = rows.loss_mask.any(-1)
        for name, (values, where) in token_loss.row_metrics.items():
            metrics.add(name, values, where & has_tokens)
        # What an algorithm computes off the mask means nothing and may be inf or NaN: select, never multiply by zero.
        # A loss that is bounded at a log-prob of -inf would hide it; 0 * inf is NaN, which stops the run.
        checked = token_loss.loss + 0.0 * logprobs.detach()
        masked = torch.where(rows.loss_mask, checked, torch.zeros_like(checked))
        return (masked * rows.token_weights).sum()


def _to(rows: R, device: torch.device) -> R:
    return replace(rows, **{item.name: getattr(rows, item.name).to(device) for item in fields(rows)})
