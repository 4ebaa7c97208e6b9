"""All sampling of a run goes through one event loop in a thread of its own, which never waits for the learner.

    prompts -> StalenessBuffer says how many -> Dispatcher: engine with the least work -> rewards -> StalenessBuffer
                                                                                               take -> controller
    evaluation, filter and collect stages -> Dispatcher.sample

The loop sees ids, lengths, versions and outcomes; tokens and text stay where they were made.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import heapq
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rlhf.errors import DeadlineError
from rlhf.ledger import Ledger
from rlhf.protocols import Taken
from rlhf.samples import SampleGroup, ScoredGroup, WeightVersion
from rollouts.buffer import StalenessBuffer
from rollouts.generator import GroupRequest

T = TypeVar("T")
_ABORT_AGAIN_S = 1.0  # an abort that overtakes its own request does nothing
GROUPS_IN_FLIGHT = 256
_AHEAD = 4  # windows of groups that may have come back and wait for one before them


@dataclass(frozen=True, slots=True)
class Aborted:
    """A group that was aborted after so many tokens of all its completions."""

    completion_tokens: int


class Engine(Protocol):
    """An engine as the dispatcher sees it."""

    async def generate(self, request: GroupRequest) -> SampleGroup | Aborted: ...

    async def abort(self, group_id: str) -> None: ...


Score = Callable[[SampleGroup], Awaitable[ScoredGroup]]


class Placement:
    """Places groups on the engine with the least to do, first come first served, in O(log engines) each.

    An engine has at most `most_samples` at once, or one group: what is beyond waits here, and goes to whichever engine
    has room first.
    """

    def __init__(self, engines: int, most_samples: int) -> None:
        self._load = [0] * engines
        self._heap = [(0, number) for number in range(engines)]
        self._most = most_samples
        self._queue: dict[str, tuple[int, asyncio.Future[int | None]]] = {}

    @property
    def waiting(self) -> int:
        """Groups without an engine."""
        return len(self._queue)

    async def place(self, group_id: str, samples: int) -> int | None:
        """The number of the engine that has room for the group; None when it was withdrawn before."""
        if not self._queue and (number := self._with_room(samples)) is not None:
            self._change(number, samples)
            return number
        future: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._queue[group_id] = (samples, future)
        return await future

    def withdraw(self, group_id: str) -> None:
        """The group waits no longer."""
        if group_id in self._queue:
            self._queue.pop(group_id)[1].set_result(None)

    def done(self, number: int, samples: int) -> None:
        """The engine has finished a group."""
        self._change(number, -samples)
        while self._queue:
            group_id, (wanted, future) = next(iter(self._queue.items()))
            free = self._with_room(wanted)
            if free is None:
                return
            del self._queue[group_id]
            if not future.cancelled():
                self._change(free, wanted)
                future.set_result(free)

    def _with_room(self, samples: int) -> int | None:
        while self._heap[0][0] != self._load[self._heap[0][1]]:
            heapq.heappop(self._heap)  # its load has changed since, and it is in the heap once more
        load, number = self._heap[0]
        return number if load == 0 or load + samples <= self._most else None

    def _change(self, number: int, samples: int) -> None:
        self._load[number] += samples
        heapq.heappush(self._heap, (self._load[number], number))
        if len(self._heap) > 8 * len(self._load) + 64:
            self._heap = [(load, engine) for engine, load in enumerate(self._load)]
            heapq.heapify(self._heap)


class Dispatcher:
    """Sends each group to the engine with the least work, all its samples together, and then to its reward."""

    def __init__(
        self, engines: Sequence[Engine], score: Score, silence_deadline_s: float, max_samples_per_engine: int = 256
    ) -> None:
        """`silence_deadline_s`: the longest time that nothing may come back while something is waited for."""
        self._engines = engines
        self._score = score
        self.silence_deadline_s = silence_deadline_s
        self._placement = Placement(len(engines), max_samples_per_engine)
        self._where: dict[str, Engine] = {}
        self._last_arrival = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dispatcher", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> list[str]:
        """The groups on an engine, oldest first."""
        return list(self._where)

    @property
    def waiting(self) -> int:
        """The groups that wait for an engine."""
        return self._placement.waiting

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` in the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def generate(self, request: GroupRequest) -> SampleGroup | Aborted:
        """Sample a group on the engine with the least work. In the loop."""
        group_id, samples = request.group_id, request.sampling.samples
        number = await self._placement.place(group_id, samples)
        if number is None:
            return Aborted(0)
        self._where[group_id] = self._engines[number]
        try:
            return await self._engines[number].generate(request)
        finally:
            del self._where[group_id]
            self._placement.done(number, samples)

    async def score(self, group: SampleGroup) -> ScoredGroup:
        """The group with its rewards. In the loop."""
        scored = await self._score(group)
        self._last_arrival = time.monotonic()
        return scored

    async def abort(self, group_id: str) -> None:
        """Return when the group is not being sampled any more. In the loop."""
        self._placement.withdraw(group_id)
        while (engine := self._where.get(group_id)) is not None:
            await engine.abort(group_id)
            end = time.monotonic() + _ABORT_AGAIN_S
            while group_id in self._where and time.monotonic() < end:
                await asyncio.sleep(0.005)

    def sample(self, requests: Iterable[GroupRequest], in_flight: int = GROUPS_IN_FLIGHT) -> Iterator[ScoredGroup]:
        """The groups of `requests` scored, in their order; at most `in_flight` are asked for at once.

        Raises DeadlineError when nothing comes back for the silence deadline. Groups that are left when the caller
        stops are aborted.
        """
        window, ahead = asyncio.Semaphore(in_flight), asyncio.Semaphore(_AHEAD * in_flight)
        admitted: queue.SimpleQueue[tuple[str, Future[ScoredGroup | None]] | None] = queue.SimpleQueue()

        async def scored(request: GroupRequest) -> ScoredGroup | None:
            try:
                group = await self.generate(request)
                return None if isinstance(group, Aborted) else await self.score(group)
            finally:
                window.release()

        async def admit() -> None:
            # A straggler at the head must not idle the engines: what comes back behind it makes room for others.
            for request in requests:
                await ahead.acquire()
                await window.acquire()
                admitted.put((request.group_id, self.call(scored(request))))

        admission = self.call(admit())
        admission.add_done_callback(lambda _: admitted.put(None))
        group_id = ""
        try:
            while (item := admitted.get()) is not None:
                group_id, future = item
                found = self.wait(future, f"group {group_id}")
                assert found is not None, "only who stops asking aborts"
                self._loop.call_soon_threadsafe(ahead.release)
                yield found
            admission.result()
        finally:
            if not admission.done():
                admission.cancel()
            self._leave(group_id, admitted)

    def wait(self, future: Future[T], what: str) -> T:
        """The result of something in the loop. Raises DeadlineError after the silence deadline."""
        started = time.monotonic()
        while True:
            done, _ = concurrent.futures.wait([future], timeout=min(1.0, self.silence_deadline_s))
            if done:
                return future.result()
            if time.monotonic() - max(started, self._last_arrival) > self.silence_deadline_s:
                raise DeadlineError(self._overdue(what))

    def _leave(self, group_id: str, admitted: queue.SimpleQueue[Any]) -> None:
        """Abort a group and those behind it in the queue, as far as they are being sampled."""
        left = [group_id]
        while not admitted.empty():
            item = admitted.get()
            left += [item[0]] if item is not None else []
        if not self._loop.is_closed():
            for one in left:
                self.call(self.abort(one))

    def _overdue(self, what: str) -> str:
        """The message for nothing having come back."""
        return (
            f"rollouts.silence_deadline_s = {self.silence_deadline_s:g}: nothing came back for that long while {what} "
            f"was waited for, with {len(self._where)} groups in flight, the oldest {next(iter(self._where), 'none')}. "
            "An engine or a reward worker is stuck: see logs/engine-*.log. If completions really take that long, "
            "raise it."
        )

    def close(self) -> None:
        """End the loop; what is in flight is not waited for."""

        async def cancelled() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        with suppress(TimeoutError):  # the reason for closing must be seen, not this
            self.call(cancelled()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


class TrainingRollouts:
    """`RolloutSource` of an RL stage: keeps groups in flight as its buffer allows, from the loop of the dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        buffer: StalenessBuffer,
        ledger: Ledger,
        request: Callable[[str, int], GroupRequest],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`request` makes what to ask for of a group's id and the place of its prompt in the stream of prompts.

        With `state`, what `state` returned, the prompts of the groups that were alive then are asked first.
        """
        self._dispatcher = dispatcher
        self._buffer = buffer
        self._ledger = ledger
        self._request = request
        saved = state or {}
        self._again = deque[int](saved.get("again", ()))
        self._next_place: int = saved.get("next_place", 0)
        self._places: dict[str, int] = {}  # of the groups alive, and of some that are not any more
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._reasons: dict[str, str] = {}
        self._open = True
        self.sampled_tokens: int = saved.get("sampled_tokens", 0)

    # --- from the controller's thread ---------------------------------------------------------------------------------

    def advance(self, version: WeightVersion) -> None:
        """The engines hold `version`: sampling from it may begin."""
        self._dispatcher.call(self._advance(version)).result()

    def take(self, version: WeightVersion) -> Taken:
        """The groups of the next step at the learner's `version`; see `StalenessBuffer.take`.

        Raises what a worker raised, RewardFailureError above the error budget, DeadlineError when nothing comes back.
        """
        return self._dispatcher.wait(self._dispatcher.call(self._take(version)), f"the step at version {version}")

    def trained(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """Close the groups that a step has trained, and check that the ledger adds up."""
        for group in groups:
            self._ledger.close(group.group.group_id, "trained", step)
        self._ledger.check()

    def state(self) -> dict[str, Any]:
        """What a resumed run gives to ledger, buffer and this class, all of one moment between two steps."""
        return self._dispatcher.call(self._state()).result(timeout=self._dispatcher.silence_deadline_s)

    def close(self) -> None:
        """Abort what is in flight; returns when no engine works for this stage any more."""
        self._dispatcher.call(self._close()).result(timeout=self._dispatcher.silence_deadline_s)

    # --- in the loop --------------------------------------------------------------------------------------------------

    async def _advance(self, version: WeightVersion) -> None:
        self._buffer.advance(version)
        self._dispatch()

    async def _take(self, version: WeightVersion) -> Taken:
        while True:
            if self._error is not None:
                raise self._error
            self._news.clear()
            self._buffer.advance(version)
            self._dispatch()
            taken = self._buffer.take(version)
            if taken is not None:
                taken.metrics["dispatch/waiting"] = self._dispatcher.waiting
                await self._abort(self._buffer.late(version), self._buffer.late_reason)
                self._buffer.close_surplus()
                self._forget_places()
                self._dispatch()
                return taken
            await self._news.wait()

    async def _state(self) -> dict[str, Any]:
        self._forget_places()
        return {
            "next_place": self._next_place,
            "again": [*self._places.values(), *self._again],
            "sampled_tokens": self.sampled_tokens,
            "buffer": self._buffer.state_dict(),
            "ledger": self._ledger.state_dict(),
        }

    def _forget_places(self) -> None:
        self._places = {group_id: self._places[group_id] for group_id in self._buffer.alive}

    def _take_place(self) -> int:
        if self._again:
            return self._again.popleft()
        self._next_place += 1
        return self._next_place - 1

    async def _close(self) -> None:
        self._open = False
        await self._abort(list(self._buffer.in_flight), "stage_end")
        for task in self._tasks:
            task.cancel()  # its group is being scored
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._buffer.close("stage_end")

    async def _abort(self, group_ids: Sequence[str], reason: str) -> None:
        self._reasons |= dict.fromkeys(group_ids, reason)
        await asyncio.gather(*(self._dispatcher.abort(group_id) for group_id in group_ids))

    def _dispatch(self) -> None:
        for _ in range(self._buffer.wanted() if self._open and self._error is None else 0):
            group_id, place = self._buffer.dispatch(), self._take_place()
            self._places[group_id] = place
            task = asyncio.create_task(self._follow(self._request(group_id, place)))
            self._tasks.add(task)
            task.add_done_callback(self._landed)

    async def _follow(self, request: GroupRequest) -> None:
        group_id, tokens = request.group_id, 0
        try:
            group = await self._dispatcher.generate(request)
            tokens = _completion_tokens(group)
            self.sampled_tokens += tokens
            scored = None if group_id in self._reasons else await self._dispatcher.score(_sampled(group))
            if scored is None or group_id in self._reasons:
                self._buffer.aborted(group_id, self._reasons.pop(group_id), tokens)
            else:
                self._buffer.receive(scored)
                self._dispatch()
        except asyncio.CancelledError:
            self._buffer.aborted(group_id, self._reasons.pop(group_id, "stage_end"), tokens)
            raise

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._error = self._error or task.exception()
        self._news.set()


def _completion_tokens(group: SampleGroup | Aborted) -> int:
    if isinstance(group, Aborted):
        return group.completion_tokens
    return sum(sample.completion_tokens for sample in group.samples)


def _sampled(group: SampleGroup | Aborted) -> SampleGroup:
    assert isinstance(group, SampleGroup), "aborted by no one"
    return group
