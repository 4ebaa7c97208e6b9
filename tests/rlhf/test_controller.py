"""The controller with ten-line fakes round it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.algorithms.agapo import Agapo
from rlhf.algorithms.grpo_icepop import GrpoIcePop
from rlhf.algorithms.kl import Kl
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.rloo import Rloo
from rlhf.batches.ragged import RolloutBatch
from rlhf.controller import Controller, StepRecord, sample_advantages, step_metrics
from rlhf.errors import NonFiniteError
from rlhf.ledger import Ledger
from rlhf.metrics import MetricSums
from rlhf.phases import Phases
from rlhf.protocols import SyncReport, Taken, UpdateReport
from rlhf.samples import Abstained, ScoredGroup
from rlhf.selection import Arrivals

MakeScored = Callable[..., ScoredGroup]
PHASES = ["rollout", "annotate", "advantage", "update", "sync"]


@dataclass
class Update:
    """One optimiser step as it was asked for; `part` are the numbers of its samples."""

    batch: RolloutBatch
    part: np.ndarray
    advantages: Tensor
    weights: Tensor

    @property
    def trained_tokens(self) -> int:
        return int(self.batch.samples.completion_tokens[self.part].sum())


class World:
    """Rollout source, learners and publisher in one; notes what it is asked in `calls`."""

    sampled_tokens = 0
    version = 3

    def __init__(self, ledger: Ledger, make_scored: MakeScored, groups: int = 4) -> None:
        self.ledger, self.make_scored, self.groups = ledger, make_scored, groups
        self.calls: list[object] = []
        self.updates: list[Update] = []
        self.broken = False
        self.kl_nats = torch.zeros(3 * groups)
        self.metrics: Mapping[str, float] = {}

    def advance(self, version: int) -> None:
        self.calls.append(("advance", version))

    def trained(self, groups: Sequence[ScoredGroup], step: int) -> None:
        for group in groups:
            self.ledger.close(group.group.group_id, "trained", step)

    def close(self) -> None: ...

    def take(self, version: int) -> Taken:
        self.calls.append(("take", version))
        ids = [f"v{version}-g{i}" for i in range(self.groups)]
        for group_id in ids:
            self.ledger.dispatch(group_id, version)
        groups = [
            self.make_scored((1.0, 0.0, i / 8), group_id=g, completion_tokens=[1 + i, 3, 2], version=version)
            for i, g in enumerate(ids)
        ]
        arrived = Arrivals()
        for group in [*groups, self.make_scored((1.0, 1.0), completion_tokens=[9, 9])]:  # the last one was filtered
            arrived.add(group)
        return Taken(groups, arrived, {"dispatch/acceptance": 0.8})

    def hold(self, batch: RolloutBatch, parts: Sequence[np.ndarray], journal: Path | None = None) -> Held:
        assert journal is not None
        self.calls.append(("hold", journal.name))
        return Held(self, batch, parts)

    def master_digests(self) -> list[dict[str, str]]:
        self.calls.append("digests")
        return [{"weight": str(self.version)}]

    def publish(self) -> SyncReport:
        self.version += 1
        self.calls.append(("publish", self.version))
        return SyncReport(self.version, 100, 0.5, 0.25, 1e-6, 1e-5)


class Held:
    """A rollout step on the learners."""

    def __init__(self, world: World, batch: RolloutBatch, parts: Sequence[np.ndarray]) -> None:
        self.world, self.batch, self.parts = world, batch, parts
        self.kl_nats = world.kl_nats

    def update(self, number: int, advantages: Tensor, weights: Tensor) -> UpdateReport:
        self.world.calls.append("update")
        asked = Update(self.batch, self.parts[number], advantages, weights)
        self.world.updates.append(asked)
        if self.world.broken:
            raise NonFiniteError("loss = nan")
        n = float(len(self.world.updates))
        tokens = asked.trained_tokens
        means = {"policy/ratio": n, **self.world.metrics}
        sums = MetricSums({name: [mean * tokens, float(tokens), mean, mean] for name, mean in means.items()})
        return UpdateReport(n, 2 * n, 1e-3 * n, tokens, sums)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path)
    yield made
    made.shutdown()


def controller(
    world: World,
    updates_per_step: int = 1,
    algorithm: OnlineAlgorithm | None = None,
) -> Controller:
    return Controller(
        rollouts=world,
        learners=world,  # type: ignore[arg-type]
        publisher=world,
        algorithm=algorithm or GrpoIcePop(),
        correct_at=1.0,
        max_staleness=4,
        updates_per_step=updates_per_step,
        journal=lambda step: Path(f"journal/{step}"),
    )


def test_a_step_takes_holds_updates_publishes_and_only_then_is_observed(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(ledger, make_scored)
    loop = controller(world)
    for record in loop.steps(2):
        world.calls.append(("observed", record.step))
    first = [("take", 3), ("hold", "0"), "update", "digests", ("publish", 4), ("advance", 4), ("observed", 0)]
    second = [("take", 4), ("hold", "1"), "update", "digests", ("publish", 5), ("advance", 5), ("observed", 1)]
    assert world.calls == first + second
    assert world.version == 5


def test_every_group_of_a_step_is_closed_as_trained_in_that_step(ledger: Ledger, make_scored: MakeScored) -> None:
    list(controller(World(ledger, make_scored)).steps(2))
    counts = ledger.counts()
    assert (counts["dispatched"], counts["trained"], counts["in_flight"]) == (8, 8, 0)
    closing = [event for event in ledger.history("v4-g2") if event.event == "trained"]
    assert [event.detail for event in closing] == [1]


def test_the_learners_hold_a_step_once_however_many_updates_it_has(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    list(controller(world, 3).steps(1))
    assert world.calls[:5] == [("take", 3), ("hold", "0"), "update", "update", "update"]
    assert all(update.batch is world.updates[0].batch for update in world.updates)


def test_a_kl_in_the_reward_is_that_of_the_held_step(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    world.kl_nats = torch.linspace(-1.0, 2.0, 12)
    algorithm = Rloo(kl=Kl(coefficient=0.5, estimator="k1", placement="reward"))
    record = controller(world, algorithm=algorithm).step(0)
    paid = (record.batch.samples.rewards - 0.5 * world.kl_nats).view(4, 3)
    expected = paid - (paid.sum(1, keepdim=True) - paid) / 2
    torch.testing.assert_close(record.advantages, expected.flatten(), atol=1e-6, rtol=0)


def test_a_kl_that_is_not_in_the_reward_changes_no_advantage(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    plain = controller(world, algorithm=Agapo()).step(0).advantages
    other = World(ledger, make_scored)
    other.kl_nats = torch.linspace(-1.0, 2.0, 12)
    loop = controller(other, algorithm=Agapo())
    other.version = 4
    assert torch.equal(loop.step(1).advantages, plain)


def test_every_part_of_the_loop_is_a_timed_phase(ledger: Ledger, make_scored: MakeScored) -> None:
    loop = controller(World(ledger, make_scored))
    list(loop.steps(1))
    assert list(loop.phase.step) == PHASES
    assert all(seconds >= 0 for seconds in loop.phase.step.values())


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_the_batch_is_split_by_whole_groups_and_every_part_has_weights_of_its_own(
    ledger: Ledger, make_scored: MakeScored, updates: int
) -> None:
    world = World(ledger, make_scored)
    record = controller(world, updates).step(0)
    assert len(world.updates) == len(record.updates) == updates
    samples = record.batch.samples
    groups = [sorted(set(samples.group_index[update.part].tolist())) for update in world.updates]
    assert sorted(g for part in groups for g in part) == [0, 1, 2, 3]
    for update in world.updates:
        tokens = samples.completion_tokens[update.part]
        # sequence_mean: 1 / (N T_i) on each token, so a part's weights add up to one.
        expected = torch.zeros(12)
        expected[update.part] = 1.0 / (len(update.part) * tokens)
        torch.testing.assert_close(update.weights, expected, atol=1e-7, rtol=0)
        assert (update.weights[update.part] * tokens).sum().item() == pytest.approx(1.0, abs=1e-6)
        assert update.weights.dtype == torch.float32
    assert sorted(n for update in world.updates for n in update.part.tolist()) == list(range(12))


def test_each_sample_trains_with_its_own_advantage(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    record = controller(world, 2).step(0)
    samples = record.batch.samples
    for update in world.updates:
        assert update.advantages is record.advantages
    for reward, group, advantage in zip(samples.rewards, samples.group_index, record.advantages, strict=True):
        mean = samples.rewards[samples.group_index == group].mean()
        assert advantage.item() == pytest.approx((reward - mean).item(), abs=1e-6)


def test_a_short_step_with_fewer_groups_than_updates_makes_no_empty_update(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(ledger, make_scored, groups=2)
    assert len(controller(world, 4).step(0).updates) == 2


def test_nothing_is_published_after_an_update_that_broke(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    world.broken = True
    with pytest.raises(NonFiniteError) as caught:
        list(controller(world, 2).steps(1))
    assert len(world.updates) == 1
    assert not any(isinstance(call, tuple) and call[0] == "publish" for call in world.calls)
    assert "in phase update" in caught.value.__notes__[0]
    assert ledger.counts()["trained"] == 0


def recorded(world: World, updates_per_step: int = 2) -> tuple[StepRecord, Phases]:
    loop = controller(world, updates_per_step)
    return loop.step(0), loop.phase


def test_step_metrics_carry_the_documented_names_and_are_plain_finite_numbers(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    record, phases = recorded(World(ledger, make_scored))
    metrics = step_metrics(record, ledger, phases)
    wanted = {"reward/mean", "reward/part/math", "rollout/completion_tokens", "staleness/max_steps", "sync/s"}
    wanted |= {"optim/grad_norm", "time/rollout_s", "perf/trained_tokens_per_s", "sync/bytes", "ledger/trained"}
    wanted |= {"policy/ratio", "rollout/zero_variance_fraction", "dispatch/acceptance", "sync/pause_s"}
    assert wanted <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    json.dumps(metrics)


def test_step_metrics_by_hand(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    record, phases = recorded(world)
    metrics = step_metrics(record, ledger, phases)
    rewards, tokens = 4 + (0 + 1 + 2 + 3) / 8, 1 + 2 + 3 + 4 + 4 * 3 + 4 * 2
    assert metrics["trained/reward_mean"] == pytest.approx(rewards / 12)
    assert metrics["trained/completion_tokens"] == pytest.approx(tokens / 12)
    assert metrics["trained/groups"] == 4
    # What the policy does is read off all that came back, the filtered group too.
    assert metrics["reward/mean"] == pytest.approx((rewards + 2) / 14)
    assert metrics["rollout/completion_tokens"] == pytest.approx((tokens + 18) / 14)
    assert metrics["rollout/zero_variance_fraction"] == pytest.approx(1 / 5)
    assert metrics["perf/trained_tokens"] == 30
    # Two updates of unlike size, with ratio 1 in the first and 2 in the second: each token counts the same.
    sizes = [update.trained_tokens for update in world.updates]
    assert sizes[0] != sizes[1]
    assert metrics["policy/ratio"] == pytest.approx((1 * sizes[0] + 2 * sizes[1]) / sum(sizes))
    # An extreme of two updates is not averaged.
    assert (metrics["policy/ratio_min"], metrics["policy/ratio_max"]) == (1.0, 2.0)
    assert metrics["policy/loss"] == 1.5
    assert metrics["optim/learning_rate"] == pytest.approx(2e-3)
    assert metrics["time/step_s"] == pytest.approx(sum(phases.step.values()))


def test_advantages_are_told_by_sample_and_leave_out_samples_without_a_reward(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(ledger, make_scored)
    group = make_scored((1.0, Abstained("math", "no"), 0.0), group_id="g")
    world.take = lambda version: Taken([group], Arrivals(), {})  # type: ignore[method-assign]
    ledger.dispatch("g", 3)
    record, _ = recorded(world, 1)
    assert sample_advantages(record) == {"g/0": 0.5, "g/2": -0.5}


@pytest.mark.parametrize(("versions", "shown"), [((3, 3), False), ((2, 2), False), ((3, 2), True)])
def test_fresh_samples_have_figures_of_their_own_only_beside_stale_ones(
    ledger: Ledger, make_scored: MakeScored, versions: tuple[int, int], shown: bool
) -> None:
    world = World(ledger, make_scored)
    world.metrics = {"mismatch/kl_nats": 0.1, "mismatch/fresh/kl_nats": 0.05}
    groups = [make_scored((1.0, 0.0), group_id=f"g{n}", version=version) for n, version in enumerate(versions)]
    world.take = lambda version: Taken(groups, Arrivals(), {})  # type: ignore[method-assign]
    for group in groups:
        ledger.dispatch(group.group.group_id, 3)
    record, phases = recorded(world, 1)
    metrics = step_metrics(record, ledger, phases)
    assert metrics["mismatch/kl_nats"] == pytest.approx(0.1)
    assert ("mismatch/fresh/kl_nats" in metrics) == shown
    assert metrics["staleness/max_steps"] == 3 - min(versions)


def test_sample_weights_count_only_samples_that_train(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    group = make_scored((1.0, Abstained("math", "no"), 0.0), group_id="g", completion_tokens=[2, 9, 4])
    world.take = lambda version: Taken([group], Arrivals(), {})  # type: ignore[method-assign]
    ledger.dispatch("g", 3)
    controller(world).step(0)
    assert world.updates[0].weights.tolist() == [1 / (2 * 2), 1 / (2 * 4)]
