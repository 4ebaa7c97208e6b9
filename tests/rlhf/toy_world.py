"""A small policy and a small batch in float64, for laws about algorithms.

A `Source` holds padded columns. Formulas see `batch_for(algorithm, source)`; the learner gets the same numbers as the
flat record `sequences_of(batch)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf import algorithms
from rlhf.algorithms import Algorithm
from rlhf.algorithms.grouper import Grouper
from rlhf.algorithms.offline import OfflineAlgorithm
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.batches import PairBatch, PreferenceBatch, Rows, ScoredSamples, SupervisedBatch, TrainBatch
from rlhf.batches.packing import Share, WorkModel, plan_batch
from rlhf.batches.ragged import (
    NO_TOKENS,
    OptimiserStep,
    PairSequences,
    PreferenceSequences,
    SupervisedSequences,
    TrainSequences,
)
from rlhf.config import OptimizerConfig
from rlhf.losses.logprobs import CHUNK_LOGITS, head_logprobs
from rlhf.training.learner import Learner
from rlhf.training.token_model import Pack
from tests.rlhf.naive_logprobs import token_logprobs

F64 = torch.float64
VOCABULARY, TEMPERATURE = 11, 0.7
BUDGET = 1000
"""Tokens of a micro-batch that holds every batch here."""
Batch = TrainBatch | SupervisedBatch | PreferenceBatch

SETTINGS: dict[str, dict[str, Any]] = {"dr_grpo": {"fixed_length": 7}}
"""What suits the small batch better than the default."""


def built(name: str, **settings: Any) -> Algorithm:
    return algorithms.build(name, SETTINGS.get(name, {}) | settings)


# --- the policy -------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A causal policy: token t + 1 depends on the mean of the embeddings up to t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=F64)
        self.head = nn.Linear(6, VOCABULARY, dtype=F64)

    def hidden(self, token_ids: Tensor) -> Tensor:
        """[..., T] -> [..., T, 6]."""
        embedded = self.embedding(token_ids)
        position = torch.arange(1, token_ids.shape[-1] + 1, dtype=embedded.dtype)
        return torch.tanh(2 * embedded.cumsum(-2) / position[:, None])

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.head(self.hidden(token_ids))


class ToyEngine:
    """A training engine of one rank that keeps the gradient of the last step and counts forward passes."""

    device = torch.device("cpu")

    def __init__(self, module: Toy, chunk_logits: int = CHUNK_LOGITS) -> None:
        self.module = module
        self.chunk_logits = chunk_logits
        self.forwards = 0

    def forward(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        self.forwards += 1
        return self.head(self.states(pack), pack.targets, temperature)

    def states(self, pack: Pack) -> Tensor:
        """[M, H]: each sequence of the pack goes through the model alone."""
        sequences = pack.token_ids[0].split(list(pack.layout.lengths))
        return torch.cat([self.module.hidden(ids) for ids in sequences]).index_select(0, pack.predictors)

    def head(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return head_logprobs(
            hidden,
            self.module.head.weight,
            targets,
            bias=self.module.head.bias,
            temperature=temperature,
            chunk_logits=self.chunk_logits,
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self.gradient = torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None])
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(learning_rate * parameter.grad)
        self.module.zero_grad()
        return float(self.gradient.norm())

    def sum_over_ranks(self, value: Tensor) -> float:
        return value.item()


# --- the batch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Samples as columns, padded on the right: [N, T] for tokens and log-probs, [N] for the rest."""

    token_ids: Tensor
    lengths: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    proximal_logprobs: Tensor
    reference_logprobs: Tensor
    rewards: Tensor
    correct: Tensor
    group_index: Tensor
    staleness: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: Tensor) -> Source:
        """The samples at `index`; the width stays."""
        return Source(**{item.name: getattr(self, item.name)[index] for item in fields(self)})


def toy_source(rewards: Tensor | None = None) -> Source:
    """Three groups of four, of different lengths, the second all incorrect; clips, masks and truncations act."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 12, 9
    lengths = torch.randint(4, width + 1, (rows,), generator=generator)
    lengths[5] = width
    position = torch.arange(width)
    mask = (position >= 2) & (position < lengths[:, None])
    token_ids = torch.randint(VOCABULARY, (rows, width), generator=generator)
    with torch.no_grad():
        exact = token_logprobs(Toy()(token_ids), token_ids, mask, temperature=TEMPERATURE)
    noise = torch.randn(3, rows, width, generator=generator, dtype=F64)
    # A few tokens far off, so that wide bounds act too.
    far = (position + torch.arange(rows)[:, None]) % 9 == 4
    proximal = torch.where(mask, exact + 0.3 * noise[0] - 1.8 * far, 0.0)
    return Source(
        token_ids=token_ids,
        lengths=lengths,
        loss_mask=mask,
        rollout_logprobs=torch.where(mask, proximal + 0.8 * noise[1], 0.0),
        proximal_logprobs=proximal,
        reference_logprobs=torch.where(mask, exact + 0.5 * noise[2], 0.0),
        rewards=torch.rand(rows, generator=generator, dtype=F64) if rewards is None else rewards,
        correct=(torch.arange(rows) % 2 == 0) & (torch.arange(rows) // 4 != 1),
        group_index=torch.arange(rows) // 4,
        staleness=torch.zeros(rows, dtype=torch.int64),
    )


def samples_of(source: Source) -> ScoredSamples:
    """The numbers that advantages are computed from."""
    return ScoredSamples(
        rewards=source.rewards,
        correct=source.correct,
        group_index=source.group_index,
        completion_tokens=source.loss_mask.sum(-1),
        staleness=source.staleness,
    )


def kl_nats(source: Source) -> Tensor:
    """[N]: the KL of each sample to the reference."""
    return torch.where(source.loss_mask, source.proximal_logprobs - source.reference_logprobs, 0.0).sum(-1)


def advantages_of(algorithm: Algorithm, source: Source) -> Tensor:
    """[N] of an online algorithm."""
    assert isinstance(algorithm, OnlineAlgorithm)
    return algorithm.advantages(samples_of(source), kl_nats(source))


def token_weights(weights: Tensor, mask: Tensor) -> Tensor:
    """[N, T]: `weights` [N] on the mask, zero elsewhere."""
    return torch.where(mask, weights[:, None], 0.0)


def batch_for(algorithm: Algorithm, source: Source | None = None) -> Batch:
    """One optimiser step for `algorithm` as its formulas see it, of whatever type it trains on."""
    source = source or toy_source()
    if isinstance(algorithm, OfflineAlgorithm):
        return _preference_batch(algorithm, source)
    if algorithm.needs.rollouts:
        return train_batch(source, advantages_of(algorithm, source), _weights(algorithm, source))
    return SupervisedBatch(*_rows(algorithm, source))


def train_batch(source: Source, advantages: Tensor, weights: Tensor) -> TrainBatch:
    """The source with `advantages` and `weights` [N]."""
    return TrainBatch(
        token_ids=source.token_ids,
        lengths=source.lengths,
        loss_mask=source.loss_mask,
        token_weights=token_weights(weights, source.loss_mask),
        rollout_logprobs=source.rollout_logprobs,
        proximal_logprobs=source.proximal_logprobs,
        reference_logprobs=source.reference_logprobs,
        advantages=advantages,
        staleness=source.staleness,
    )


def _preference_batch(algorithm: OfflineAlgorithm, source: Source) -> PreferenceBatch:
    """The rows as pairs, or as groups."""
    rows = _rows(algorithm, source)
    if isinstance(algorithm, Grouper):
        advantages = algorithm.advantages(source.rewards, source.group_index)
        return PreferenceBatch(*rows, advantages, source.reference_logprobs)
    signs = torch.tensor([1.0, -1.0], dtype=F64).repeat(len(source) // 2)
    return PairBatch(*rows, signs, source.reference_logprobs)


def _rows(algorithm: Algorithm, source: Source) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = token_weights(_weights(algorithm, source), source.loss_mask)
    return source.token_ids, source.lengths, source.loss_mask, weights


def _weights(algorithm: Algorithm, source: Source) -> Tensor:
    return algorithm.sample_weights(source.loss_mask.sum(-1), F64)


def unit_size(algorithm: Algorithm) -> int:
    """Rows that stay together and in order."""
    return 2 if algorithm.needs.data == "pairs" else 1


def units(algorithm: Algorithm, order: Tensor) -> Tensor:
    """Row numbers of the units in `order`."""
    size = unit_size(algorithm)
    return (order[:, None] * size + torch.arange(size)).flatten()


# --- the batch as the learner takes it --------------------------------------------------------------------------------


def sequences_of(batch: Batch) -> OptimiserStep:
    """The rows without their padding; floats stay float64, which the learner passes on."""
    present = torch.arange(batch.token_ids.shape[1]) < batch.lengths[:, None]

    def flat(values: Tensor) -> np.ndarray:
        return values[present].numpy() if values.shape[1] else NO_TOKENS

    common: dict[str, Any] = {
        "token_ids": flat(batch.token_ids).astype(np.int32),
        "loss_mask": flat(batch.loss_mask),
        "offsets": np.concatenate([[0], batch.lengths.cumsum(0).numpy()]),
        "weights": batch.token_weights.amax(-1).numpy(),
    }
    if isinstance(batch, SupervisedBatch):
        return SupervisedSequences(**common)
    common |= {"advantages": batch.advantages.numpy(), "reference_logprobs": flat(batch.reference_logprobs)}
    if isinstance(batch, PreferenceBatch):
        return (PairSequences if isinstance(batch, PairBatch) else PreferenceSequences)(**common)
    return TrainSequences(
        **common,
        rollout_logprobs=flat(batch.rollout_logprobs),
        sample_index=np.arange(len(batch)),
        staleness=batch.staleness.numpy(),
        proximal_logprobs=flat(batch.proximal_logprobs),
    )


def whole(sequences: OptimiserStep) -> Share[OptimiserStep]:
    """One rank with one micro-batch."""
    return Share(sequences, (len(sequences),))


def learner(
    algorithm: Algorithm, engine: ToyEngine | None = None, *, rate: float = 1e-30, temperature: float = TEMPERATURE
) -> tuple[Learner, ToyEngine]:
    engine = engine or ToyEngine(Toy())
    return Learner(engine, algorithm, OptimizerConfig(learning_rate=rate), 1, temperature), engine


def loss_and_gradient(
    algorithm: Algorithm, batch: Batch | OptimiserStep, *, token_budget: int = BUDGET, ranks: int = 1
) -> tuple[float, Tensor]:
    """Summed over the ranks, as the engine of a real run does."""
    sequences = sequences_of(batch) if isinstance(batch, Rows) else batch
    loss, gradient = 0.0, torch.zeros(())
    for share in plan_batch(sequences, ranks, token_budget, WorkModel()).shares(sequences):
        one, engine = learner(algorithm)
        loss += one.update(share).loss
        gradient = gradient + engine.gradient
    assert math.isfinite(loss) and gradient.isfinite().all()
    return loss, gradient


# --- laws -------------------------------------------------------------------------------------------------------------


def assert_same(
    algorithm: Algorithm,
    batch: Batch,
    other: Batch | OptimiserStep,
    *,
    trains: bool = True,
    token_budget: int = BUDGET,
    ranks: int = 1,
) -> None:
    """Both batches give one loss and one gradient, which is not nothing where the algorithm `trains` on them."""
    loss, gradient = loss_and_gradient(algorithm, batch)
    other_loss, other_gradient = loss_and_gradient(algorithm, other, token_budget=token_budget, ranks=ranks)
    assert gradient.norm() > 1e-3 or not trains
    assert abs(other_loss - loss) < 1e-12
    torch.testing.assert_close(other_gradient, gradient, atol=1e-12, rtol=0)


def policy_logprobs(algorithm: Algorithm, batch: Batch, module: nn.Module | None = None) -> Tensor:
    """[B, T] of the toy policy, at the temperature that the learner takes."""
    temperature = TEMPERATURE if algorithm.needs.rollouts else 1.0
    logits = (module or Toy())(batch.token_ids)
    return token_logprobs(logits, batch.token_ids, batch.loss_mask, temperature=temperature)


def reduced(algorithm: Algorithm, logprobs: Tensor, batch: Batch) -> Tensor:
    loss = algorithm.token_loss(logprobs, batch).loss
    return (torch.where(batch.loss_mask, loss, torch.zeros_like(loss)) * batch.token_weights).sum()


def assert_agrees(
    algorithm: Algorithm, batch: Batch, naive: tuple[float, dict[tuple[int, int], float]], logprobs: Tensor
) -> None:
    """Loss and gradient of the reduced loss, and the gradient of the policy's weights that the learner finds."""
    naive_loss, naive_gradient = naive
    expected = torch.zeros_like(logprobs)
    for token, value in naive_gradient.items():
        expected[token] = value
    leaf = logprobs.detach().requires_grad_()
    loss = reduced(algorithm, leaf, batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert abs(loss.item() - naive_loss) < 1e-10
    assert (gradient - expected).abs().max() < 1e-10
    through_learner, of_weights = loss_and_gradient(algorithm, batch)
    assert abs(through_learner - naive_loss) < 1e-10
    policy = Toy()
    (policy_logprobs(algorithm, batch, policy) * expected).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert (of_weights - wanted).abs().max() < 1e-10


def widened(batch: Batch, extra: int, rows: int = 0) -> Batch:
    """`extra` columns of padding and below `rows` full rows that train nothing; both hold NaN where a table can."""

    def wide(value: Tensor, filler: float) -> Tensor:
        sides = (0, extra, 0, rows) if value.ndim == 2 else (0, rows)
        return torch.nn.functional.pad(value, sides, value=filler if value.ndim == 2 else 0)

    fillers = {torch.bool: 0, torch.int64: VOCABULARY - 1}
    columns = {item.name: getattr(batch, item.name) for item in fields(batch)}
    columns = {name: wide(value, fillers.get(value.dtype, math.nan)) for name, value in columns.items()}
    width = batch.token_ids.shape[1] + extra
    lengths = torch.cat([batch.lengths, torch.full((rows,), width)])
    return replace(batch, **columns | {"lengths": lengths, "token_weights": wide(batch.token_weights, 0.0)})
