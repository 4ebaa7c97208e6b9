"""The loop that never stops: engines of plain coroutines, the real buffer, ledger and threads."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf import jsonl
from rlhf.errors import DeadlineError, WorkerLostError
from rlhf.ledger import STATES, Ledger
from rlhf.samples import Prompt, SampleGroup, ScoredGroup
from rlhf.selection import Rejected
from rollouts.buffer import Limits, StalenessBuffer
from rollouts.dispatcher import Aborted, Dispatcher, Placement, TrainingRollouts
from rollouts.engine import Sampling
from rollouts.generator import GroupRequest

MakeScored = Callable[..., ScoredGroup]
SAMPLING = Sampling(2, 8, 1.0)


class Engine:
    """Samples for `delay()` seconds, from the version that `World` has then."""

    def __init__(self, world: World, delay: Callable[[], float]) -> None:
        self.world, self.delay = world, delay
        self.running: dict[str, asyncio.Task[Any]] = {}
        self.most = 0
        self.seen: list[str] = []

    async def generate(self, request: GroupRequest) -> SampleGroup | Aborted:
        version = self.world.version
        self.seen.append(request.group_id)
        task = asyncio.ensure_future(asyncio.sleep(self.delay()))
        self.running[request.group_id] = task
        self.most = max(self.most, len(self.running))
        try:
            await task
        except asyncio.CancelledError:
            return Aborted(5)
        finally:
            del self.running[request.group_id]
        group = self.world.make_scored((1.0, 0.0), group_id=request.group_id, version=version).group
        return replace(group, prompt=request.prompt)

    async def abort(self, group_id: str) -> None:
        if group_id in self.running:
            self.running[group_id].cancel()


class World:
    def __init__(self, make_scored: MakeScored, engines: int = 2, delay: Callable[[], float] = lambda: 0.002) -> None:
        self.make_scored = make_scored
        self.version = 0
        self.engines = [Engine(self, delay) for _ in range(engines)]
        self.dispatcher = Dispatcher(self.engines, self.score, silence_deadline_s=20.0)

    async def score(self, group: SampleGroup) -> ScoredGroup:
        await asyncio.sleep(0.001)
        whole = self.make_scored((1.0, 0.0), group_id=group.group_id)
        return replace(whole, group=group)


@pytest.fixture
def worlds(make_scored: MakeScored) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(*args: Any, **settings: Any) -> World:
        made.append(World(make_scored, *args, **settings))
        return made[-1]

    yield make
    for world in made:
        world.dispatcher.close()


def requests(count: int, prefix: str = "e") -> list[GroupRequest]:
    return [GroupRequest(f"{prefix}{i}", prompt(i), False, SAMPLING) for i in range(count)]


def prompt(number: int) -> Prompt:
    return Prompt(f"p{number}", ({"role": "user", "content": "?"},), "", "math")


# --- which engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [1, 2, 7])
def test_a_group_goes_to_the_engine_with_the_least_to_do_and_waits_while_all_are_full(engines: int) -> None:
    placement, load, rng = Placement(engines, 64), [0] * engines, random.Random(0)
    running: list[tuple[int, int]] = []
    placed: list[str] = []
    ids = [f"g{number}" for number in range(2000)]

    async def one(group_id: str, samples: int) -> None:
        number = await placement.place(group_id, samples)
        assert number is not None
        assert load[number] == min(load)
        assert load[number] == 0 or load[number] + samples <= 64
        load[number] += samples
        running.append((number, samples))
        placed.append(group_id)

    async def all_of_them() -> None:
        tasks = []
        for group_id in ids:
            tasks.append(asyncio.create_task(one(group_id, rng.choice([1, 16, 100]))))
            await asyncio.sleep(0)
            while placement.waiting > 20 or (running and rng.random() < 0.4):
                number, samples = running.pop(rng.randrange(len(running)))
                load[number] -= samples
                placement.done(number, samples)
                await asyncio.sleep(0)
        while running:
            number, samples = running.pop()
            load[number] -= samples
            placement.done(number, samples)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    assert placed == ids, "first come, first served"
    assert placement.waiting == 0


def test_a_group_that_still_waits_can_be_withdrawn() -> None:
    placement = Placement(1, 4)

    async def withdrawn() -> tuple[int | None, ...]:
        first = await placement.place("a", 4)
        second = asyncio.create_task(placement.place("b", 4))
        await asyncio.sleep(0)
        placement.withdraw("b")
        placement.withdraw("no such group")
        return first, await second

    assert asyncio.run(withdrawn()) == (0, None)
    assert placement.waiting == 0


# --- what is asked for all at once ------------------------------------------------------------------------------------


def test_groups_come_back_in_their_order_and_engines_are_loaded_alike(worlds: Callable[..., World]) -> None:
    delays = random.Random(1)
    world = worlds(3, delay=lambda: delays.random() / 100)
    found = list(world.dispatcher.sample(requests(60)))
    assert [scored.group.group_id for scored in found] == [f"e{i}" for i in range(60)]
    assert all(len(engine.seen) > 12 for engine in world.engines)
    assert world.dispatcher.in_flight == []


def test_no_more_than_the_window_is_in_flight_and_a_straggler_does_not_idle_the_engines(
    worlds: Callable[..., World],
) -> None:
    delays = itertools.chain([0.6], itertools.repeat(0.002))
    world = worlds(1, delay=lambda: next(delays))
    found = world.dispatcher.sample(requests(40), in_flight=4)
    started = time.monotonic()
    assert next(found).group.group_id == "e0"
    assert len(world.engines[0].seen) == 16, "all others that may wait came back behind the first"
    assert world.engines[0].most <= 4
    assert len(list(found)) == 39
    assert time.monotonic() - started < 5


def test_who_stops_asking_leaves_nothing_running(worlds: Callable[..., World]) -> None:
    world = worlds(1, delay=lambda: 30.0)
    found = world.dispatcher.sample(requests(3))
    world.dispatcher.silence_deadline_s = 0.1
    with pytest.raises(DeadlineError, match=r"group e0 was waited for, with 3 groups in flight, the oldest e0"):
        next(found)
    deadline = time.monotonic() + 5
    while world.dispatcher.in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert world.dispatcher.in_flight == []


def test_no_more_wait_for_the_caller_than_a_few_windows(worlds: Callable[..., World]) -> None:
    world = worlds(1)
    found = world.dispatcher.sample(requests(400), in_flight=4)
    assert next(found).group.group_id == "e0"
    time.sleep(0.3)
    assert len(world.engines[0].seen) <= 4 * 4 + 1
    found.close()


def test_the_failure_of_a_worker_is_raised_where_it_is_waited_for(worlds: Callable[..., World]) -> None:
    world = worlds(1)

    async def lost(group: SampleGroup) -> ScoredGroup:
        raise WorkerLostError("the reward worker was lost")

    world.dispatcher._score = lost
    with pytest.raises(WorkerLostError, match="reward worker was lost"):
        list(world.dispatcher.sample(requests(3)))


# --- a training stage -------------------------------------------------------------------------------------------------


class Stage:
    """A stage with everything real but the engines; the learner only counts versions."""

    def __init__(
        self,
        world: World,
        tmp_path: Path,
        *,
        filtered: float = 0.0,
        state: dict[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        staleness = limits.setdefault("max_staleness", 0)
        limits = {"prompts_per_step": 4, "max_dispatch_factor": 1000, "error_budget": 0.05, **limits}
        limits = {"pipeline_depth": staleness + 1, "total_groups": 40, **limits}
        verdicts = random.Random(3)
        saved = state or {}
        self.world, self.ledger = world, Ledger(tmp_path, saved.get("ledger"))
        self.limits = Limits(name="rl", **limits)

        def select(scored: ScoredGroup) -> Rejected | None:
            return Rejected("filtered", "all_wrong") if verdicts.random() < filtered else None

        def request(group_id: str, place: int) -> GroupRequest:
            return GroupRequest(group_id, prompt(place), False, SAMPLING)

        buffer = StalenessBuffer(select, self.ledger, self.limits, saved.get("buffer"))
        self.rollouts = TrainingRollouts(world.dispatcher, buffer, self.ledger, request, state)
        self.step = 0

    def train(self, seconds: float = 0.01) -> list[ScoredGroup]:
        groups = self.rollouts.take(self.world.version).groups
        lags = [self.world.version - group.group.first_version for group in groups]
        assert all(0 <= lag <= self.limits.max_staleness for lag in lags)
        time.sleep(seconds)
        self.world.version += 1
        self.rollouts.trained(groups, self.step)
        self.rollouts.advance(self.world.version)
        self.step += 1
        return groups


@pytest.mark.parametrize("policy", ["wait", "mask", "abort"])
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_every_group_ends_in_one_state_and_none_is_too_old(
    worlds: Callable[..., World], tmp_path: Path, staleness: int, policy: str
) -> None:
    delays = random.Random(2)
    world = worlds(3, delay=lambda: delays.expovariate(150))
    stage = Stage(world, tmp_path, filtered=0.5, max_staleness=staleness, late_groups=policy)
    trained = [group.group.group_id for _ in range(10) for group in stage.train(delays.random() / 50)]
    stage.rollouts.close()
    counts = stage.ledger.counts()
    assert len(trained) == len(set(trained)) == counts["trained"] == 40
    assert counts["in_flight"] == 0
    assert counts["dispatched"] == sum(counts[state] for state in STATES)
    assert counts["dispatched"] == sum(len(engine.seen) for engine in world.engines)
    assert world.dispatcher.in_flight == []


def test_engines_go_on_while_the_learner_updates(worlds: Callable[..., World], tmp_path: Path) -> None:
    world = worlds(1, delay=lambda: 0.01)
    stage = Stage(world, tmp_path, max_staleness=1)
    groups = stage.rollouts.take(0).groups
    before = len(world.engines[0].seen)
    time.sleep(0.2)
    assert len(world.engines[0].seen) >= before
    stage.world.version = 1
    stage.rollouts.trained(groups, 0)
    started = time.monotonic()
    assert len(stage.rollouts.take(1).groups) == 4
    assert time.monotonic() - started < 0.15, "they were sampled during the update"


def test_a_synchronous_step_begins_to_sample_when_its_weights_are_there_and_not_before(
    worlds: Callable[..., World], tmp_path: Path
) -> None:
    world = worlds(1, delay=lambda: 0.01)
    stage = Stage(world, tmp_path)
    stage.rollouts.take(0)
    seen = len(world.engines[0].seen)
    time.sleep(0.1)
    assert len(world.engines[0].seen) == seen
    world.version = 1
    stage.rollouts.advance(1)
    deadline = time.monotonic() + 5
    while len(world.engines[0].seen) == seen and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(world.engines[0].seen) > seen, "before anybody takes"


def test_a_refill_does_not_come_in_waves(worlds: Callable[..., World], tmp_path: Path) -> None:
    """Nothing waits for the others of its wave: each group that is filtered is made up for at once."""
    delays = random.Random(2)
    world = worlds(1, delay=lambda: 0.01 + delays.random() / 50)
    stage = Stage(world, tmp_path, filtered=0.6, prompts_per_step=16, max_staleness=1, total_groups=160)
    busy: Counter[int] = Counter()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            busy[len(world.engines[0].running)] += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(9):
        stage.train(0.0)
    stop.set()
    watcher.join()
    stage.rollouts.close()
    looks = busy.total()
    assert sum(count for running, count in busy.items() if running >= 12) > 0.8 * looks, busy


def test_a_reward_that_is_still_computed_when_the_stage_ends_is_not_waited_for(
    worlds: Callable[..., World], tmp_path: Path, make_scored: MakeScored
) -> None:
    world = worlds(1)
    stage = Stage(world, tmp_path, max_staleness=1)
    groups = stage.rollouts.take(0).groups

    async def forever(group: SampleGroup) -> ScoredGroup:
        await asyncio.sleep(3600)
        raise AssertionError

    world.dispatcher._score = forever
    stage.rollouts.advance(1)
    time.sleep(0.1)
    stage.rollouts.trained(groups, 0)
    stage.rollouts.close()
    counts = stage.ledger.counts()
    assert counts["in_flight"] == 0
    assert counts["aborted"] > 0


def test_what_a_worker_raises_ends_the_next_take(worlds: Callable[..., World], tmp_path: Path) -> None:
    world = worlds(1)

    async def lost(group: SampleGroup) -> ScoredGroup:
        raise WorkerLostError("gone")

    world.dispatcher._score = lost
    with pytest.raises(WorkerLostError, match="gone"):
        Stage(world, tmp_path).rollouts.take(0)


def test_when_nothing_comes_back_the_deadline_says_what_is_missing(
    worlds: Callable[..., World], tmp_path: Path
) -> None:
    world = worlds(1, delay=lambda: 3600.0)
    world.dispatcher.silence_deadline_s = 0.2
    with pytest.raises(DeadlineError, match=r"the step at version 0 was waited for, with 4 groups in flight, the old"):
        Stage(world, tmp_path).rollouts.take(0)


# --- a run that is resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resumed_stage_asks_the_lost_prompts_first_and_trains_every_prompt_once(
    worlds: Callable[..., World], tmp_path: Path, staleness: int
) -> None:
    delays = random.Random(2)
    first = Stage(worlds(2, delay=lambda: delays.expovariate(200)), tmp_path, max_staleness=staleness)
    trained = [group.group.prompt.prompt_id for _ in range(4) for group in first.train()]
    state = json.loads(json.dumps(first.rollouts.state()))
    alive = {prompt(place).prompt_id for place in state["again"]}
    assert len(alive) == len(state["ledger"]["in_flight"]) > 0
    first.train()  # is lost with what the first process did since
    first.rollouts.close()
    first.ledger.shutdown()
    jsonl.cut(tmp_path / "ledger.jsonl", state["ledger"]["bytes"])

    second = Stage(worlds(2, delay=lambda: delays.expovariate(200)), tmp_path, max_staleness=staleness, state=state)
    second.world.version, second.step = 4, 4
    trained += [group.group.prompt.prompt_id for _ in range(6) for group in second.train()]
    asked_again = {prompt(place).prompt_id for place in second.rollouts.state()["again"]}
    second.rollouts.close()
    counts = second.ledger.counts()
    assert len(trained) == len(set(trained)) == 40
    assert alive <= set(trained) | asked_again
    assert counts["lost"] == len(alive)
    assert counts["dispatched"] == sum(counts[state] for state in STATES)
    second.ledger.check()
    assert len({record["group_id"] for record in jsonl.read(tmp_path / "ledger.jsonl")}) == counts["dispatched"]
