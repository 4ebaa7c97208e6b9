"""Async and group rewards in real grader processes: side by side, cancelled, retried, killed, never lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewards.processes import Answer, Call, Failure, ProcessPool
from rewards.registry import Abstain, RewardInput, Score
from rlhf.errors import WorkerLostError

MIB = 1 << 20

AUTHOR = """
import asyncio, os, pathlib, signal, sys, time
from rewards import Abstain, RewardInput, Score, TransientRewardError, reward

@reward("slow", retry=(ConnectionError,))
async def slow(sample: RewardInput, seconds: float = 0.2):
    how = sample.final
    if how == "block": time.sleep(600)
    if how == "swallow":
        while True:
            try: await asyncio.sleep(600)
            except asyncio.CancelledError: pass
    if how == "late":
        try: await asyncio.sleep(600)
        except asyncio.CancelledError: return 1.0
    if how == "hang": await asyncio.sleep(600)
    if how == "exit": os._exit(3)
    if how == "fork": os.fork()
    if how == "memory": return len([bytearray(1 << 20) for _ in range(10**6)])
    if how == "busy server": raise TransientRewardError("503")
    if how == "dropped": raise ConnectionResetError("dropped")
    if how == "raise": raise ValueError("the author's own message")
    if how == "system exit": sys.exit(3)
    await asyncio.sleep(seconds)
    if how == "nan": return float("nan")
    if how == "abstain": return Abstain("no")
    return Score(0.5, str(os.getpid()))

@reward("ranked", low=-1.0, group=True)
def ranked(samples):
    how = samples[0].final
    if how == "too few": return [1.0]
    if how == "text": return "1.0" * len(samples)
    if how == "none": return None
    if how == "raise": raise ValueError("of the whole group")
    if how == "hang": time.sleep(600)
    if how == "mixed": return [1.0, float("nan"), Abstain("no"), 7.0, "x"]
    return [len(sample.final) / max(len(s.final) for s in samples) for sample in samples]

@reward("ranked_async", group=True)
async def ranked_async(samples):
    await asyncio.sleep(0.05)
    return [True] * (len(samples) - (samples[0].final == "too few"))
"""


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("author") / "waiting.py"
    path.write_text(AUTHOR)
    return str(path)


@contextmanager
def open_pool(author: str) -> Iterator[ProcessPool]:
    pool = ProcessPool(1, 512 * MIB, [author], async_calls=64)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="module")
def pool(author: str) -> Iterator[ProcessPool]:
    """Shared: a process that one test kills is replaced in the next."""
    with open_pool(author) as pool:
        yield pool


@pytest.fixture
def fresh_pool(author: str) -> Iterator[ProcessPool]:
    """A pool without an async process yet, for the tests that tell its processes apart."""
    with open_pool(author) as pool:
        yield pool


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.lane.GRACE_S", 0.3)


def call(how: str, deadline_s: float = 20.0, **params: float) -> Call:
    return Call("slow", RewardInput.of(how), params, deadline_s)


def grouped(component: str, *finals: str, deadline_s: float = 5.0) -> Call:
    return Call(component, tuple(RewardInput.of(final) for final in finals), {}, deadline_s)


def kinds(answers: list[Answer]) -> list[str]:
    verdicts = [verdict for answer in answers for verdict in answer.verdicts]
    return [verdict.kind if isinstance(verdict, Failure) else type(verdict).__name__ for verdict in verdicts]


def pids(answers: list[Answer]) -> set[str]:
    return {verdict.reason for answer in answers for verdict in answer.verdicts if isinstance(verdict, Score)}


def test_64_calls_wait_side_by_side_in_one_process(pool: ProcessPool) -> None:
    pool.answers([call("warm up", seconds=0.0)])
    started = time.monotonic()
    answers = pool.answers([call(f"fine {i}", seconds=0.5) for i in range(64)])
    assert time.monotonic() - started < 10.0
    assert kinds(answers) == ["Score"] * 64
    assert len(pids(answers)) == 1


def test_no_more_calls_are_in_flight_than_allowed(author: str) -> None:
    pool = ProcessPool(1, 512 * MIB, [author], async_calls=2)
    try:
        started = time.monotonic()
        assert kinds(pool.answers([call(f"fine {i}", seconds=0.2) for i in range(6)])) == ["Score"] * 6
        assert time.monotonic() - started >= 0.6
    finally:
        pool.close()


def test_a_call_that_overruns_is_cancelled_and_the_process_goes_on(pool: ProcessPool) -> None:
    before = pids(pool.answers([call("fine")]))
    answers = pool.answers([call("fine"), call("hang", 0.3), call("late", 0.3), call("fine 2")])
    assert kinds(answers) == ["Score", "timeout", "timeout", "Score"]
    assert pids(answers) == before


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("how", ["block", "swallow"])
def test_a_call_that_does_not_react_is_killed_and_only_it_fails(pool: ProcessPool, how: str) -> None:
    calls = [call("fine"), call(how, 0.5), call("fine 2", seconds=1.0), call("abstain")]
    assert kinds(pool.answers(calls)) == ["Score", "timeout", "Score", "Abstain"]


def test_a_call_that_ends_the_process_is_the_only_one_that_fails(pool: ProcessPool) -> None:
    calls = [call(f"fine {i}", seconds=0.3) for i in range(4)]
    calls[2] = call("exit")
    answers = pool.answers(calls)
    assert kinds(answers) == ["Score"] * 2 + ["crash"] + ["Score"]
    failure = answers[2].failure
    assert failure is not None and "exit code 3" in failure.message


def test_a_process_killed_in_the_middle_loses_no_sample(fresh_pool: ProcessPool) -> None:
    one_at_a_time = set(fresh_pool.pids())
    fresh_pool.answers([call("warm up", seconds=0.0)])
    (before,) = set(fresh_pool.pids()) - one_at_a_time
    results: list[Answer] = []
    calls = [call(f"fine {i}", seconds=0.7) for i in range(3)]
    thread = threading.Thread(target=lambda: results.extend(fresh_pool.answers(calls)))
    thread.start()
    time.sleep(0.3)
    os.kill(before, signal.SIGKILL)
    thread.join(30.0)
    assert kinds(results) == ["Score"] * 3
    assert before not in fresh_pool.pids()


def test_every_kind_of_end_is_told_apart(pool: ProcessPool) -> None:
    hows = ["fine", "raise", "busy server", "dropped", "nan", "abstain", "memory", "system exit"]
    answers = pool.answers([call(how) for how in hows])
    assert kinds(answers)[:7] == ["Score", "raised", "transient", "transient", "invalid", "Abstain", "memory"]
    assert kinds(answers)[7] == "raised"
    raised = answers[1].failure
    assert raised is not None and "in slow" in raised.traceback
    assert "grader.py" not in raised.traceback
    assert not raised.transient


def test_a_forked_copy_does_not_answer_a_second_time(pool: ProcessPool) -> None:
    assert kinds(pool.answers([call("fork"), call("fine"), call("abstain")])) == ["Score", "Score", "Abstain"]


def test_close_ends_async_calls_in_flight(author: str) -> None:
    pool = ProcessPool(1, 512 * MIB, [author])
    pool.answers([call("warm up")])
    raised: list[BaseException] = []

    def caller() -> None:
        try:
            pool.answers([call("hang", 60.0)])
        except WorkerLostError as error:
            raised.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    time.sleep(0.3)
    files = len(list(Path("/proc/self/fd").iterdir()))
    pool.close()
    thread.join(10.0)
    assert not thread.is_alive()
    assert len(raised) == 1
    assert pool.pids() == ()
    assert len(list(Path("/proc/self/fd").iterdir())) < files


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["ranked", "ranked_async"])
def test_a_group_reward_gives_each_sample_its_value(pool: ProcessPool, component: str) -> None:
    (answer,) = pool.answers([grouped(component, "aa", "bbbb")])
    values = [verdict.value for verdict in answer.verdicts if isinstance(verdict, Score)]
    assert values == ([0.5, 1.0] if component == "ranked" else [1.0, 1.0])


@pytest.mark.parametrize("component", ["ranked", "ranked_async"])
def test_a_wrong_number_of_values_is_invalid_for_every_sample(pool: ProcessPool, component: str) -> None:
    answers = pool.answers([grouped(component, "too few", "b", "c")])
    assert kinds(answers) == ["invalid"] * 3
    failure = answers[0].failure
    assert failure is not None and "for 3 samples" in failure.message


@pytest.mark.parametrize(
    ("how", "kind"), [("text", "invalid"), ("none", "invalid"), ("raise", "raised"), ("hang", "timeout")]
)
def test_a_group_reward_that_fails_fails_for_every_sample(pool: ProcessPool, how: str, kind: str) -> None:
    assert kinds(pool.answers([grouped("ranked", how, "b", deadline_s=1.0)])) == [kind] * 2


def test_one_wrong_value_of_a_group_fails_that_sample_alone(pool: ProcessPool) -> None:
    (answer,) = pool.answers([grouped("ranked", "mixed", "b", "c", "d", "e")])
    assert kinds([answer]) == ["Score", "invalid", "Abstain", "invalid", "invalid"]
    assert answer.verdicts[2] == Abstain("no")


# --- health -----------------------------------------------------------------------------------------------------------


def test_every_process_answers_a_canary(fresh_pool: ProcessPool) -> None:
    assert fresh_pool.health().answered == 1
    fresh_pool.answers([call("fine")])
    health = fresh_pool.health()
    assert (health.processes, health.answered, health.failed) == (2, 2, 0)


def test_a_stopped_process_fails_the_canary_and_is_replaced(
    fresh_pool: ProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.processes.CANARY_DEADLINE_S", 0.5)
    (pid,) = fresh_pool.pids()
    os.kill(pid, signal.SIGSTOP)
    assert fresh_pool.health().failed == 1
    monkeypatch.undo()
    assert fresh_pool.health().answered == 1
    assert fresh_pool.pids() != (pid,)
