"""The buffer's bounds, over every order in which groups may come back, and the whole dispatcher on top of it."""

from __future__ import annotations

import itertools
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import GroupwiseError, RewardFailureError
from rlhf.ledger import STATES, Ledger
from rlhf.protocols import Taken
from rlhf.samples import RewardFailed, ScoredGroup, VersionSpan
from rlhf.selection import Rejected, select
from rollouts.buffer import LatePolicy, Limits, StalenessBuffer

MakeScored = Callable[..., ScoredGroup]
REJECTED = Rejected("filtered", "all_wrong")


class World:
    """Engines and learner of one stage: groups finish in random order, some untrainable, and span weight versions."""

    def __init__(
        self, make_scored: MakeScored, ledger: Ledger, seed: int, filtered: float = 0.0, steps: int = 10, **limits: Any
    ) -> None:
        self.random, self.make_scored, self.ledger, self.filtered = random.Random(seed), make_scored, ledger, filtered
        staleness = limits.setdefault("max_staleness", 0)
        limits = {"prompts_per_step": 4, "max_dispatch_factor": 1000, "error_budget": 0.05, **limits}
        limits = {"pipeline_depth": staleness + 1, "total_groups": steps * limits["prompts_per_step"], **limits}
        select_group = limits.pop("select", lambda _: REJECTED if self.random.random() < self.filtered else None)
        self.limits = Limits(name="rl", **limits)
        self.buffer = StalenessBuffer(select_group, ledger, self.limits)
        self.version, self.step = 0, 0
        self.spans: dict[str, list[VersionSpan]] = {}
        self.slow: set[str] = set()
        self.most_alive = 0

    def dispatch(self) -> int:
        wanted = self.buffer.wanted()
        for _ in range(wanted):
            group_id = self.buffer.dispatch()
            self.spans[group_id] = []
            if self.random.random() < 0.1:
                self.slow.add(group_id)
        self.most_alive = max(self.most_alive, len(self.ledger.in_flight))
        return wanted

    def sample(self) -> None:
        """Some groups get tokens of the present weights."""
        for spans in self.spans.values():
            if self.random.random() < 0.5:
                start = spans[-1].end if spans else 0
                spans.append(VersionSpan(self.version, start, start + self.random.randint(1, 3)))

    def land(self) -> None:
        """Some groups come back; the slow ones seldom."""
        for group_id in list(self.spans):
            if self.random.random() < (0.02 if group_id in self.slow else 0.5):
                self.land_one(group_id)
        self.dispatch()

    def land_one(self, group_id: str, outcomes: Any = (1.0, 0.0)) -> None:
        spans = tuple(self.spans.pop(group_id)) or (VersionSpan(self.version, 0, 2),)
        short = tuple(span for span in spans if span.version == spans[0].version)
        of_samples = [spans, short] + [spans] * (len(outcomes) - 2)
        lengths = [one[-1].end for one in of_samples]
        self.buffer.receive(self.make_scored(outcomes, group_id=group_id, spans=of_samples, completion_tokens=lengths))

    def take(self) -> Taken:
        """As the dispatcher takes, with other events in between."""
        for _ in range(100_000):
            self.dispatch()
            taken = self.buffer.take(self.version)
            if taken is not None:
                for group_id in self.buffer.late(self.version):
                    tokens = sum(span.end - span.start for span in self.spans.pop(group_id))
                    self.buffer.aborted(group_id, self.buffer.late_reason, tokens)
                self.buffer.close_surplus()
                return taken
            self.sample()
            self.land()
        raise AssertionError("no step after 100,000 rounds")

    def train(self, groups: list[ScoredGroup]) -> None:
        """An update, a sync; engines work on meanwhile."""
        for _ in range(self.random.randint(0, 3)):
            self.dispatch()
            self.sample()
            self.land()
        for group in groups:
            self.ledger.close(group.group.group_id, "trained", self.step)
        self.ledger.check()
        self.version += 1
        self.step += 1
        self.buffer.advance(self.version)
        self.dispatch()

    def oldest_trained(self, group: ScoredGroup) -> int:
        """The age of the oldest token that trains, as `rollout_batch` masks it."""
        oldest = self.version - self.limits.max_staleness
        versions = [span.version for s in group.group.samples for span in s.version_spans if span.version >= oldest]
        if self.limits.late_groups != "mask":
            versions = [span.version for s in group.group.samples for span in s.version_spans]
        return self.version - min(versions)


@contextmanager
def opened_ledger() -> Iterator[Ledger]:
    with tempfile.TemporaryDirectory() as directory:
        ledger = Ledger(Path(directory))
        yield ledger
        ledger.shutdown()


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with opened_ledger() as made:
        yield made


def run(world: World, steps: int) -> list[str]:
    """A whole stage; the ids of what trained."""
    taken: list[str] = []
    for _ in range(steps):
        groups = world.take().groups
        assert len(groups) == world.limits.prompts_per_step, "filtered groups are made up for"
        assert all(0 <= world.oldest_trained(group) <= world.limits.max_staleness for group in groups)
        taken += [group.group.group_id for group in groups]
        world.train(groups)
    assert len(taken) == len(set(taken)), "none trains twice"
    for group_id in list(world.spans):
        world.spans.pop(group_id)
        world.buffer.aborted(group_id, "stage_end", 0)
    world.buffer.close("stage_end")
    return taken


# --- laws -------------------------------------------------------------------------------------------------------------

POLICIES: list[LatePolicy] = ["wait", "mask", "abort"]


@given(
    seed=st.integers(0, 2**32),
    filtered=st.sampled_from([0.0, 0.2, 0.7]),
    per_step=st.integers(1, 4),
    staleness=st.integers(0, 4),
    depth=st.integers(1, 5),
    steps=st.integers(1, 7),
    policy=st.sampled_from(POLICIES),
)
def test_staleness_and_the_ledger_hold_in_every_order_of_completion(
    make_scored: MakeScored,
    seed: int,
    filtered: float,
    per_step: int,
    staleness: int,
    depth: int,
    steps: int,
    policy: LatePolicy,
) -> None:
    with opened_ledger() as ledger:
        limits = {"prompts_per_step": per_step, "max_staleness": staleness, "late_groups": policy}
        depth = min(depth, staleness + 1)
        world = World(make_scored, ledger, seed, filtered, steps, pipeline_depth=depth, **limits)
        taken = run(world, steps)
        counts = ledger.counts()
        assert (counts["in_flight"], counts["trained"]) == (0, steps * per_step) == (0, len(taken))
        assert counts["dispatched"] == sum(counts[state] for state in STATES)


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_ten_thousand_groups_keep_every_law(make_scored: MakeScored, staleness: int) -> None:
    """With pacing no work is thrown away but the surplus of the last step, or of every step without staleness."""
    with opened_ledger() as ledger:
        world = World(make_scored, ledger, 7, 0.6, 200, prompts_per_step=20, max_staleness=staleness)
        run(world, 200)
        counts = ledger.counts()
        assert counts["dispatched"] > 9_000
        assert (counts["in_flight"], counts["stale"]) == (0, 0)
        if staleness:
            assert counts["aborted"] <= 3 * 20


@given(seed=st.integers(0, 2**32), factor=st.integers(1, 3), staleness=st.integers(0, 3))
def test_with_few_tries_a_step_is_short_or_an_error_and_the_bounds_still_hold(
    make_scored: MakeScored, seed: int, factor: int, staleness: int
) -> None:
    with opened_ledger() as ledger:
        world = World(make_scored, ledger, seed, 0.6, 8, max_staleness=staleness, max_dispatch_factor=factor)
        for _ in range(8):
            before = ledger.counts()["dispatched"]
            try:
                groups = world.take().groups
            except GroupwiseError:  # none of the tries was trainable
                break
            assert ledger.counts()["dispatched"] - before <= 4 * factor
            assert 1 <= len(groups) <= 4
            assert all(0 <= world.oldest_trained(group) <= staleness for group in groups)
            world.train(groups)
        ledger.check()


# --- pacing -----------------------------------------------------------------------------------------------------------


def test_any_ready_group_may_train_while_a_straggler_has_time(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0, prompts_per_step=2, max_staleness=1)
    assert world.dispatch() == 4
    for number in (2, 3):
        world.land_one(f"rl-00000{number}")
    assert [group.group.group_id for group in world.take().groups] == ["rl-000002", "rl-000003"]


def test_a_straggler_that_the_next_step_could_not_train_is_waited_for(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0, prompts_per_step=2, max_staleness=1)
    world.dispatch()
    for spans in world.spans.values():
        spans.append(VersionSpan(0, 0, 2))
    for number in (2, 3):
        world.land_one(f"rl-00000{number}")
    world.buffer.take(0)
    world.version = 1
    world.buffer.advance(1)
    assert world.dispatch() == 2
    for number in (4, 5):
        world.land_one(f"rl-00000{number}")
    assert world.buffer.take(1) is None, "rl-000000 and rl-000001 would be two versions old at the next step"
    world.land_one("rl-000000")
    assert world.buffer.take(1) is None
    world.land_one("rl-000001")
    taken = world.buffer.take(1)
    assert taken is not None
    assert [group.group.group_id for group in taken.groups] == ["rl-000000", "rl-000001"]


def test_late_groups_are_aborted_where_that_is_the_policy(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0, prompts_per_step=2, max_staleness=1, late_groups="abort")
    world.dispatch()
    for number in (2, 3):
        world.land_one(f"rl-00000{number}")
    assert world.buffer.take(0) is not None
    assert world.buffer.late(0) == [], "the next step can still train both"
    world.version = 1
    world.buffer.advance(1)
    world.dispatch()
    for number in (4, 5):
        world.land_one(f"rl-00000{number}")
    taken = world.buffer.take(1)
    assert taken is not None and len(taken.groups) == 2
    assert world.buffer.late(1) == ["rl-000000", "rl-000001"]
    assert world.buffer.late_reason == "late"


def test_a_group_whose_tokens_are_all_too_old_is_replaced_when_the_version_advances(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(make_scored, ledger, 0, prompts_per_step=2, max_staleness=1, total_groups=2, late_groups="mask")
    assert world.dispatch() == 2
    for number in (0, 1):
        world.land_one(f"rl-00000{number}")
    world.version = 2
    world.buffer.advance(2)
    assert ledger.counts()["stale"] == 2
    assert world.dispatch() == 2, "before the take, which would wait for groups that nobody samples"


@pytest.mark.parametrize(("depth", "alive"), [(1, 2), (2, 4), (3, 6)])
def test_groups_are_kept_alive_for_as_many_steps_as_the_depth_says(
    ledger: Ledger, make_scored: MakeScored, depth: int, alive: int
) -> None:
    world = World(make_scored, ledger, 0, prompts_per_step=2, max_staleness=2, pipeline_depth=depth)
    assert world.dispatch() == alive


def test_dispatch_goes_on_during_the_update_unless_nothing_may_be_stale(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    for staleness, wanted in ((1, 2), (0, 0)):
        world = World(make_scored, ledger, 0, prompts_per_step=2, max_staleness=staleness)
        world.buffer = StalenessBuffer(lambda _: None, ledger, world.limits)
        world.buffer._number = 100 * (staleness + 1)
        world.dispatch()
        for group_id in list(world.spans)[:2]:
            world.land_one(group_id)
        for group_id in list(world.spans):
            world.spans.pop(group_id)
            world.buffer.aborted(group_id, "surplus", 0)
        assert world.buffer.take(0) is not None
        assert world.buffer.wanted() == wanted
        world.buffer.advance(1)
        assert world.buffer.wanted() == 2 * (staleness + 1)


def test_a_synchronous_step_over_dispatches_by_the_acceptance_and_aborts_the_surplus(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(make_scored, ledger, 3, 0.6, 40)
    for _ in range(8):
        world.train(world.take().groups)
    assert world.buffer.acceptance == pytest.approx(0.4, abs=0.15)
    assert len(world.spans) >= 8, "two and a half times the need"
    metrics = world.take().metrics
    assert world.spans == {} and ledger.counts()["aborted"] > 0
    assert metrics["dispatch/acceptance"] == world.buffer.acceptance
    world.train([])
    metrics = world.take().metrics
    assert metrics["dispatch/aborted/surplus"] == metrics["dispatch/aborted"] > 0
    assert metrics["dispatch/aborted_tokens_mean"] > 0


# --- limits -----------------------------------------------------------------------------------------------------------


def test_when_no_prompt_is_trainable_the_error_says_what_was_tried_and_what_to_do(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(make_scored, ledger, 0, filtered=1.0, max_dispatch_factor=3)
    with pytest.raises(GroupwiseError, match=r"12 prompts were sampled for one step and none was trainable") as caught:
        world.take()
    assert "'filtered/all_wrong': 12" in str(caught.value)
    assert "change the data or its difficulty" in str(caught.value)


def test_a_step_that_found_too_few_trainable_groups_is_short(ledger: Ledger, make_scored: MakeScored) -> None:
    verdicts = itertools.chain([None], itertools.repeat(REJECTED))
    world = World(make_scored, ledger, 0, max_dispatch_factor=2, select=lambda scored: next(verdicts))
    assert len(world.take().groups) == 1
    assert ledger.counts()["dispatched"] == 8


def test_every_step_has_tries_of_its_own(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0, max_dispatch_factor=1)
    for _ in range(10):
        groups = world.take().groups
        assert len(groups) == 4
        world.train(groups)


FAILED = RewardFailed("math", "division by zero", "Traceback: line 7 of the_authors_file.py", 2)


def scoring(world: World, failures: Callable[[int], int]) -> None:
    """From now on the i-th group comes back with `failures(i)` failed rewards and two good ones."""
    numbers, land_one = itertools.count(), world.land_one
    outcomes = ((FAILED,) * failures(number) + (1.0, 0.0) for number in numbers)
    world.land_one = lambda group_id: land_one(group_id, next(outcomes))  # type: ignore[method-assign,misc,assignment]


def variance(scored: ScoredGroup) -> Rejected | None:
    return select(scored, "zero_variance")


def test_above_the_error_budget_the_run_stops_with_the_authors_traceback_and_the_sample(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(make_scored, ledger, 0, error_budget=0.1, select=variance)
    scoring(world, lambda i: 2)
    with pytest.raises(RewardFailureError) as caught:
        world.take()
    text = str(caught.value)
    assert text.startswith("rewards.error_budget = 0.1: 2 of 4 rewards of this step failed.")
    assert "Traceback: line 7 of the_authors_file.py" in text
    assert re.search(r"reward 'math' on sample rl-\d{6}/0, prompt prompt-rl-\d{6}, 2 attempt\(s\): division", text)
    assert "the completion of rl-" in text


def test_below_the_error_budget_the_other_samples_train(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0, error_budget=0.1, select=variance)
    scoring(world, lambda i: int(i == 0))
    groups = world.take().groups
    assert len(groups) == 4
    assert sum(len(group.valued) for group in groups) == 8


def test_a_budget_of_zero_stops_at_the_first_failure(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0, error_budget=0.0, select=variance)
    scoring(world, lambda i: int(i == 3))
    with pytest.raises(RewardFailureError, match="1 of 9 rewards of this step failed"):
        world.take()


def test_failures_are_counted_anew_in_each_step(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0, error_budget=0.12, select=variance)
    scoring(world, lambda i: int(i % 4 == 0))
    for _ in range(6):
        world.train(world.take().groups)
