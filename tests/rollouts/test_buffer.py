"""The buffer's bounds, over every order in which groups may come back."""

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

from rlhf.errors import DeadlineError, GroupwiseError, RewardFailureError
from rlhf.ledger import Ledger
from rlhf.samples import Prompt, RewardFailed, ScoredGroup
from rlhf.selection import Rejected, select
from rollouts.buffer import Limits, StalenessBuffer

MakeScored = Callable[..., ScoredGroup]
REJECTED = Rejected("filtered", "all_wrong")


class World:
    """A dispatcher whose groups finish in random order, some of them untrainable; sampling starts late or at once."""

    def __init__(self, make_scored: MakeScored, ledger: Ledger, seed: int, filtered: float = 0.0) -> None:
        self.make_scored, self.ledger, self.filtered = make_scored, ledger, filtered
        self.random = random.Random(seed)
        self.version = 0
        self.running: dict[str, int] = {}
        self.prompts: list[str] = []
        self.most_alive = 0

    def submit(self, group_id: str, prompt: Prompt) -> None:
        self.running[group_id] = self.version
        self.prompts.append(prompt.prompt_id)
        self.most_alive = max(self.most_alive, len(self.ledger.in_flight))

    def completed(self, timeout_s: float) -> list[ScoredGroup]:
        assert self.running, "waits for a group although none is running"
        done = self.random.sample(sorted(self.running), self.random.randint(1, len(self.running)))
        starts = {group_id: self.random.choice([self.running.pop(group_id), self.version]) for group_id in done}
        return [self.make_scored((1.0, 0.0), group_id=g, version=v) for g, v in starts.items()]

    def select(self, scored: ScoredGroup) -> Rejected | None:
        return REJECTED if self.random.random() < self.filtered else None


def endless_prompts() -> Iterator[Prompt]:
    return (Prompt(f"p{i}", ({"role": "user", "content": "?"},), "", "math") for i in itertools.count())


def buffer_of(world: Any, ledger: Ledger, steps: int = 10, **settings: Any) -> StalenessBuffer:
    chosen = {"prompts_per_step": 4, "max_staleness": 0, "max_dispatch_factor": 8, "error_budget": 0.05, **settings}
    total = steps * chosen["prompts_per_step"]
    select_group = chosen.pop("select", None) or world.select
    return StalenessBuffer(
        world, endless_prompts(), select_group, ledger, Limits(name="rl", total_groups=total, deadline_s=5.0, **chosen)
    )


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


def train(world: World, ledger: Ledger, groups: list[ScoredGroup], step: int) -> None:
    for group in groups:
        ledger.close(group.group.group_id, "trained", step)
    ledger.check()
    world.version += 1


# --- laws -------------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32),
    filtered=st.sampled_from([0.0, 0.2, 0.7]),
    per_step=st.integers(1, 4),
    staleness=st.integers(0, 3),
    steps=st.integers(1, 7),
)
def test_capacity_staleness_and_the_ledger_hold_in_every_order_of_completion(
    make_scored: MakeScored, seed: int, filtered: float, per_step: int, staleness: int, steps: int
) -> None:
    with opened_ledger() as ledger:
        world = World(make_scored, ledger, seed, filtered)
        settings = {"prompts_per_step": per_step, "max_staleness": staleness, "max_dispatch_factor": 1000}
        buffer = buffer_of(world, ledger, steps, **settings)
        taken: list[str] = []
        for step in range(steps):
            groups = buffer.take(world.version)
            assert len(groups) == per_step, "filtered groups are made up for"
            assert all(0 <= world.version - g.group.first_version <= staleness for g in groups)
            taken += [g.group.group_id for g in groups]
            train(world, ledger, groups, step)
        assert world.most_alive <= buffer.capacity == (staleness + 1) * per_step
        assert taken == sorted(set(taken)), "oldest first, none twice"
        assert world.running == {}, "nothing runs that no step needs"
        counts = ledger.counts()
        assert (counts["in_flight"], counts["trained"]) == (0, steps * per_step)
        assert counts["dispatched"] == counts["trained"] + counts["filtered"] == len(set(world.prompts))


@given(seed=st.integers(0, 2**32), factor=st.integers(1, 3), staleness=st.integers(0, 3))
def test_with_few_tries_a_step_is_short_or_an_error_and_the_bounds_still_hold(
    make_scored: MakeScored, seed: int, factor: int, staleness: int
) -> None:
    with opened_ledger() as ledger:
        world = World(make_scored, ledger, seed, filtered=0.6)
        buffer = buffer_of(world, ledger, 8, max_staleness=staleness, max_dispatch_factor=factor)
        for step in range(8):
            before = ledger.counts()["dispatched"]
            try:
                groups = buffer.take(world.version)
            except GroupwiseError:  # none of the tries was trainable
                break
            assert ledger.counts()["dispatched"] - before <= 4 * factor
            assert 1 <= len(groups) <= 4
            assert all(0 <= world.version - g.group.first_version <= staleness for g in groups)
            train(world, ledger, groups, step)
        assert world.most_alive <= buffer.capacity
        ledger.check()


def test_an_older_group_is_waited_for_although_younger_ones_are_ready(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    order = [["rl-000003", "rl-000002"], ["rl-000001"], ["rl-000000"]]

    def completed(timeout_s: float) -> list[ScoredGroup]:
        return [make_scored((1.0, 0.0), group_id=group_id) for group_id in order.pop(0)]

    world.completed = completed  # type: ignore[method-assign]
    groups = buffer_of(world, ledger, prompts_per_step=2, max_staleness=1).take(0)
    assert [g.group.group_id for g in groups] == ["rl-000000", "rl-000001"]
    assert order == []


def test_the_buffer_runs_ahead_by_its_staleness_and_no_further(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    buffer = buffer_of(world, ledger, prompts_per_step=2, max_staleness=2)
    first = buffer.take(0)
    assert len(ledger.in_flight) == 6
    train(world, ledger, first, 0)
    buffer.take(1)
    assert len(ledger.in_flight) == 6


def test_sampled_tokens_count_what_was_filtered_too(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, seed=5, filtered=0.5)
    buffer = buffer_of(world, ledger, 1)
    buffer.take(0)
    assert buffer.sampled_tokens == ledger.counts()["dispatched"] * 2 * 3
    assert ledger.counts()["filtered"] > 0


# --- limits -----------------------------------------------------------------------------------------------------------


def test_when_no_prompt_is_trainable_the_error_says_what_was_tried_and_what_to_do(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(make_scored, ledger, 0, filtered=1.0)
    with pytest.raises(GroupwiseError, match=r"12 prompts were sampled for one step and none was trainable") as caught:
        buffer_of(world, ledger, max_dispatch_factor=3).take(0)
    assert "'filtered/all_wrong': 12" in str(caught.value)
    assert "change the data or its difficulty" in str(caught.value)


def test_a_step_that_found_too_few_trainable_groups_is_short(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    verdicts = itertools.chain([None], itertools.repeat(REJECTED))
    buffer = buffer_of(world, ledger, max_dispatch_factor=2, select=lambda scored: next(verdicts))
    assert len(buffer.take(0)) == 1
    assert ledger.counts()["dispatched"] == 8


def test_every_step_has_tries_of_its_own(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    buffer = buffer_of(world, ledger, max_dispatch_factor=1)
    for step in range(10):
        groups = buffer.take(world.version)
        assert len(groups) == 4
        train(world, ledger, groups, step)


FAILED = RewardFailed("math", "division by zero", "Traceback: line 7 of the_authors_file.py", 2)


def scoring(world: World, make_scored: MakeScored, failures: Callable[[int], int]) -> None:
    """From now on the i-th group comes back with `failures(i)` failed rewards and two good ones."""
    numbers = itertools.count()

    def completed(timeout_s: float) -> list[ScoredGroup]:
        group_id, version = world.running.popitem()
        outcomes = (FAILED,) * failures(next(numbers)) + (1.0, 0.0)
        return [make_scored(outcomes, group_id=group_id, version=version)]

    world.completed = completed  # type: ignore[method-assign]


def variance(scored: ScoredGroup) -> Rejected | None:
    return select(scored, "zero_variance")


def test_above_the_error_budget_the_run_stops_with_the_authors_traceback_and_the_sample(
    ledger: Ledger, make_scored: MakeScored
) -> None:
    world = World(make_scored, ledger, 0)
    scoring(world, make_scored, lambda i: 2)
    with pytest.raises(RewardFailureError) as caught:
        buffer_of(world, ledger, error_budget=0.1, select=variance).take(0)
    text = str(caught.value)
    assert text.startswith("rewards.error_budget = 0.1: 2 of 4 rewards of this step failed.")
    assert "Traceback: line 7 of the_authors_file.py" in text
    assert re.search(r"reward 'math' on sample rl-\d{6}/0, prompt prompt-rl-\d{6}, 2 attempt\(s\): division", text)
    assert "the completion of rl-" in text


def test_below_the_error_budget_the_other_samples_train(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    scoring(world, make_scored, lambda i: int(i == 0))
    groups = buffer_of(world, ledger, error_budget=0.1, select=variance).take(0)
    assert len(groups) == 4
    assert sum(len(group.valued) for group in groups) == 8


def test_a_budget_of_zero_stops_at_the_first_failure(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    scoring(world, make_scored, lambda i: int(i == 3))
    with pytest.raises(RewardFailureError, match="1 of 9 rewards of this step failed"):
        buffer_of(world, ledger, error_budget=0.0, select=variance).take(0)


def test_failures_are_counted_anew_in_each_step(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    scoring(world, make_scored, lambda i: int(i % 4 == 0))
    buffer = buffer_of(world, ledger, error_budget=0.12, select=variance)
    for step in range(6):
        train(world, ledger, buffer.take(world.version), step)


def test_a_deadline_names_the_oldest_group_that_is_missing(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    first = [make_scored((1.0, 0.0), group_id="rl-000000"), make_scored((1.0, 0.0), group_id="rl-000002")]
    answers = iter([first, []])
    world.completed = lambda timeout_s: next(answers)  # type: ignore[method-assign]
    with pytest.raises(DeadlineError, match="2 groups in flight, the oldest rl-000001") as caught:
        buffer_of(world, ledger).take(0)
    assert str(caught.value).startswith("rollouts.silence_deadline_s = 5")


def test_a_group_that_is_older_than_allowed_is_never_handed_out(ledger: Ledger, make_scored: MakeScored) -> None:
    world = World(make_scored, ledger, 0)
    world.completed = lambda timeout_s: [  # type: ignore[method-assign]
        make_scored((1.0, 0.0), group_id=g, version=1) for g in list(world.running)
    ]
    with pytest.raises(AssertionError, match="is 2 versions old"):
        buffer_of(world, ledger, max_staleness=0).take(3)
