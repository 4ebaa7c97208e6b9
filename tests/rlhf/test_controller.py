"""The controller with ten-line fakes round it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.agapo import Agapo
from rlhf.algorithms.grpo_icepop import GrpoIcePop
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.batches import RolloutBatch, TrainBatch, UpdateReport
from rlhf.controller import Controller, StepRecord, sample_advantages, step_metrics
from rlhf.errors import NonFiniteError
from rlhf.ledger import Ledger
from rlhf.phases import Phases
from rlhf.protocols import SyncReport
from rlhf.samples import Abstained, ScoredGroup
from rlhf.selection import Arrivals

MakeScored = Callable[..., ScoredGroup]
PHASES = ["rollout", "annotate", "advantage", "update", "sync"]


class World:
    """Rollout source, learners and publisher in one; notes what it is asked in `calls`."""

    sampled_tokens = 0

    def __init__(self, ledger: Ledger, make_scored: MakeScored, groups: int = 4) -> None:
        self.ledger, self.make_scored, self.groups = ledger, make_scored, groups
        self.calls: list[object] = []
        self.updates: list[TrainBatch] = []
        self.arrived = Arrivals()
        self.broken = False

    def take(self, version: int) -> list[ScoredGroup]:
        self.calls.append(("take", version))
        ids = [f"v{version}-g{i}" for i in range(self.groups)]
        for group_id in ids:
            self.ledger.dispatch(group_id, version)
        groups = [
            self.make_scored((1.0, 0.0, i / 8), group_id=g, completion_tokens=[1 + i, 3, 2], version=version)
            for i, g in enumerate(ids)
        ]
        self.arrived = Arrivals()
        for group in [*groups, self.make_scored((1.0, 1.0), completion_tokens=[9, 9])]:  # the last one was filtered
            self.arrived.add(group)
        return groups

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        self.calls.append("proximal")
        return batch.rollout_logprobs - 0.1 * batch.loss_mask

    def reference_logprobs(self, batch: RolloutBatch) -> Tensor:
        self.calls.append("reference")
        return batch.rollout_logprobs - 0.2 * batch.loss_mask

    def update(self, batch: TrainBatch) -> UpdateReport:
        self.calls.append("update")
        self.updates.append(batch)
        if self.broken:
            raise NonFiniteError("loss = nan")
        n = float(len(self.updates))
        return UpdateReport(n, 2 * n, 1e-3 * n, int(batch.loss_mask.sum()), {"policy/ratio": n, "policy/ratio_max": n})

    def publish(self, version: int) -> SyncReport:
        self.calls.append(("publish", version))
        return SyncReport(version, 100, 0.5, 1e-6, 1e-5)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path)
    yield made
    made.shutdown()


def controller(
    world: World,
    updates_per_step: int = 1,
    dumped: list[TrainBatch] | None = None,
    algorithm: OnlineAlgorithm | None = None,
) -> Controller:
    return Controller(
        rollouts=world,
        learners=world,  # type: ignore[arg-type]
        publisher=world,
        algorithm=algorithm or GrpoIcePop(),
        ledger=world.ledger,
        version=3,
        correct_at=1.0,
        updates_per_step=updates_per_step,
        observe=lambda record: world.calls.append(("observe", record.step)),
        dump=(dumped if dumped is not None else []).append,
    )


def test_a_step_takes_annotates_updates_publishes_and_only_then_is_observed(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(ledger, make_scored)
    loop = controller(world)
    loop.run(2)
    first = [("take", 3), "proximal", "update", ("publish", 4), ("observe", 0)]
    assert world.calls == [*first, ("take", 4), "proximal", "update", ("publish", 5), ("observe", 1)]
    assert loop.version == 5


def test_every_group_of_a_step_is_closed_as_trained_in_that_step(ledger: Ledger, make_scored: MakeScored) -> None:
    controller(World(ledger, make_scored)).run(2)
    counts = ledger.counts()
    assert (counts["dispatched"], counts["trained"], counts["in_flight"]) == (8, 8, 0)
    closing = [event for event in ledger.history("v4-g2") if event.event == "trained"]
    assert [event.detail for event in closing] == [1]


def test_the_reference_is_asked_only_where_the_algorithm_needs_it(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    controller(world, algorithm=Agapo()).run(1)
    assert world.calls[:4] == [("take", 3), "proximal", "reference", "update"]
    batch = world.updates[0]
    torch.testing.assert_close(batch.reference_logprobs, batch.rollout_logprobs - 0.2 * batch.loss_mask)


def test_every_part_of_the_loop_is_a_timed_phase(ledger: Ledger, make_scored: MakeScored) -> None:
    loop = controller(World(ledger, make_scored))
    loop.run(1)
    assert list(loop.phase.step) == PHASES
    assert all(seconds >= 0 for seconds in loop.phase.step.values())


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_the_batch_is_split_by_whole_groups_and_every_part_has_weights_of_its_own(
    ledger: Ledger, make_scored: MakeScored, updates: int
) -> None:
    world = World(ledger, make_scored)
    record = controller(world, updates).step(0)
    assert len(world.updates) == len(record.updates) == updates
    groups = [sorted(set(part.group_index.tolist())) for part in world.updates]
    assert sorted(g for part in groups for g in part) == [0, 1, 2, 3]
    for part in world.updates:
        # sequence_mean: 1 / (N T_i) on each token, so a part's weights add up to one.
        assert part.token_weights.sum().item() == pytest.approx(1.0, abs=1e-6)
        assert part.token_weights[~part.loss_mask].abs().sum() == 0
        assert part.token_ids.shape[1] == int(part.lengths.max())
    assert sum(len(part) for part in world.updates) == len(record.batch) == 12


def test_each_row_trains_with_its_own_advantage(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    record = controller(world, 2).step(0)
    for part in world.updates:
        for rewards, group, advantage in zip(part.rewards, part.group_index, part.advantages, strict=True):
            mean = record.batch.rewards[record.batch.group_index == group].mean()
            assert advantage.item() == pytest.approx((rewards - mean).item(), abs=1e-6)


def test_a_short_step_with_fewer_groups_than_updates_makes_no_empty_update(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(ledger, make_scored, groups=2)
    assert len(controller(world, 4).step(0).updates) == 2


def test_the_batch_that_broke_the_loss_is_dumped_and_nothing_is_published(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world, dumped = World(ledger, make_scored), []
    world.broken = True
    with pytest.raises(NonFiniteError) as caught:
        controller(world, 1, dumped).run(1)
    assert dumped == world.updates
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
    wanted |= {"mismatch/kl_nats", "rollout/zero_variance_fraction"}
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
    assert metrics["mismatch/kl_nats"] == pytest.approx(0.1, abs=1e-6)
    # Two updates of unlike size, with ratio 1 in the first and 2 in the second: each token counts the same.
    sizes = [int(batch.loss_mask.sum()) for batch in world.updates]
    assert metrics["policy/ratio"] == pytest.approx((1 * sizes[0] + 2 * sizes[1]) / sum(sizes))
    assert metrics["policy/ratio_max"] == 2.0  # an extreme of two updates is not averaged
    assert metrics["policy/loss"] == 1.5
    assert metrics["optim/learning_rate"] == pytest.approx(2e-3)
    assert metrics["time/step_s"] == pytest.approx(sum(phases.step.values()))


def test_advantages_are_told_by_sample_and_leave_out_samples_without_a_reward(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(ledger, make_scored)
    group = make_scored((1.0, Abstained("math", "no"), 0.0), group_id="g")
    world.take = lambda version: [group]  # type: ignore[method-assign]
    ledger.dispatch("g", 3)
    record, _ = recorded(world, 1)
    assert sample_advantages(record) == {"g/0": 0.5, "g/2": -0.5}


def test_token_weights_count_only_rows_that_train(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(ledger, make_scored)
    group = make_scored((1.0, Abstained("math", "no"), 0.0), group_id="g", completion_tokens=[2, 9, 4])
    world.take = lambda version: [group]  # type: ignore[method-assign]
    ledger.dispatch("g", 3)
    controller(world).step(0)
    expected = torch.tensor([1 / (2 * 2)] * 2 + [1 / (2 * 4)] * 4)
    torch.testing.assert_close(world.updates[0].token_weights[world.updates[0].loss_mask], expected)
