"""A small policy and a small batch in float64, for laws about algorithms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import algorithms
from rlhf.algorithms import Algorithm
from rlhf.algorithms.grouper import Grouper
from rlhf.algorithms.offline import OfflineAlgorithm
from rlhf.batches import AnnotatedBatch, PairBatch, PreferenceBatch, Rows, SupervisedBatch, TrainBatch, train_batch
from rlhf.config import OptimizerConfig
from rlhf.losses.logprobs import token_logprobs
from rlhf.training.batching import deal, micro_batch_count
from rlhf.training.learner import Learner

F64 = torch.float64
VOCABULARY, TEMPERATURE = 11, 0.7
Batch = TrainBatch | SupervisedBatch | PreferenceBatch

SETTINGS: dict[str, dict[str, Any]] = {"dr_grpo": {"fixed_length": 7}}
"""What suits the small batch better than the default."""


def built(name: str, **settings: Any) -> Algorithm:
    return algorithms.build(name, SETTINGS.get(name, {}) | settings)


class Toy(nn.Module):
    """A causal policy: token t + 1 depends on the mean of the embeddings up to t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, 6, dtype=F64)
        self.head = nn.Linear(6, VOCABULARY, dtype=F64)

    def forward(self, token_ids: Tensor) -> Tensor:
        position = torch.arange(1, token_ids.shape[1] + 1, dtype=F64)
        return self.head(torch.tanh(2 * self.embedding(token_ids).cumsum(1) / position[:, None]))


class ToyEngine:
    """A training engine of one rank that keeps the gradient of the last step."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def logits(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.module(token_ids)

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

    def sum_over_ranks(self, value: float) -> float:
        return value


def annotated_batch(rewards: Tensor | None = None) -> AnnotatedBatch:
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
    return AnnotatedBatch(
        token_ids=token_ids,
        lengths=lengths,
        loss_mask=mask,
        rollout_logprobs=torch.where(mask, proximal + 0.8 * noise[1], 0.0),
        rewards=torch.rand(rows, generator=generator, dtype=F64) if rewards is None else rewards,
        correct=(torch.arange(rows) % 2 == 0) & (torch.arange(rows) // 4 != 1),
        group_index=torch.arange(rows) // 4,
        staleness=torch.zeros(rows, dtype=torch.int64),
        proximal_logprobs=proximal,
        reference_logprobs=torch.where(mask, exact + 0.5 * noise[2], 0.0),
    )


def batch_for(algorithm: Algorithm, annotated: AnnotatedBatch | None = None) -> Batch:
    """One optimiser step for `algorithm`, of whatever type it trains on."""
    source = annotated or annotated_batch()
    weights = algorithm.token_weights(source.loss_mask, F64)
    if algorithm.needs.rollouts:
        return train_batch(source, algorithm.advantages(source), weights)
    if isinstance(algorithm, OfflineAlgorithm):
        return preference_batch(algorithm, source, weights)
    return SupervisedBatch(source.token_ids, source.lengths, source.loss_mask, weights)


def preference_batch(algorithm: OfflineAlgorithm, source: AnnotatedBatch, weights: Tensor) -> PreferenceBatch:
    """The rows as pairs, or as groups."""
    rows = (source.token_ids, source.lengths, source.loss_mask)
    if isinstance(algorithm, Grouper):
        advantages = algorithm.advantages(source.rewards, source.group_index)
        return PreferenceBatch(*rows, advantages, source.reference_logprobs, weights)
    signs = torch.tensor([1.0, -1.0], dtype=F64).repeat(len(source) // 2)
    return PairBatch(*rows, signs, source.reference_logprobs, weights)


def units(batch: Rows, order: Tensor) -> Tensor:
    """Row numbers of the units in `order`."""
    return (order[:, None] * batch.rows_per_unit + torch.arange(batch.rows_per_unit)).flatten()


def learner(algorithm: Algorithm, micro_batch_size: int = 100, rate: float = 1e-30) -> tuple[Learner, ToyEngine]:
    engine = ToyEngine(Toy())
    return Learner(engine, algorithm, OptimizerConfig(learning_rate=rate), 1, micro_batch_size, TEMPERATURE), engine


def loss_and_gradient(
    algorithm: Algorithm, batch: Batch, micro_batch_size: int = 100, ranks: int = 1
) -> tuple[float, Tensor]:
    """Summed over the ranks, as the engine of a real run does."""
    count = micro_batch_count(batch, ranks, micro_batch_size)
    loss, gradient = 0.0, torch.zeros(())
    for share in deal(batch, ranks):
        one, engine = learner(algorithm, micro_batch_size)
        loss += one.update(batch.rows(share), count).loss
        gradient = gradient + engine.gradient
    assert math.isfinite(loss) and gradient.isfinite().all()
    return loss, gradient


def assert_same(algorithm: Algorithm, batch: Batch, other: Batch, *, trains: bool = True, **split: int) -> None:
    """Both batches give one loss and one gradient, which is not nothing where the algorithm `trains` on them."""
    loss, gradient = loss_and_gradient(algorithm, batch)
    other_loss, other_gradient = loss_and_gradient(algorithm, other, **split)
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
