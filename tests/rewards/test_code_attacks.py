"""The sandbox where the suite of all attacks does not look: its weaker tiers, and the death of its owner."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.attacks.catalogue import programs
from benchmarks.attacks.host import Host, left_processes
from benchmarks.attacks.run import HONEST, LIMITS, task_tests
from rewards.code import Limits, Tier, grade
from rewards.code.slots import FIRST_UID, SLOTS, in_use, slot
from rewards.code.tiers import ORDER, probe

TESTS = task_tests("values", "")
SOURCES = {program.id: program.source for program in programs()}


@pytest.fixture(scope="module")
def tier() -> Tier:
    found = next((tier for tier in ORDER if probe(tier) is None), None)
    if found is None:
        pytest.skip("no sandbox tier holds here")
    return found


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.mark.parametrize("weaker", [Tier.USERNS, Tier.LANDLOCK])
@pytest.mark.parametrize(
    "name", ["fork-bomb", "memory-bomb-of-many", "double-fork", "kills-everyone", "answers-twice", "secret-file"]
)
def test_the_weaker_tiers_hold_too(name: str, weaker: Tier, host: Host) -> None:
    if (problem := probe(weaker)) is not None:
        pytest.skip(f"{weaker}: {problem}")
    assert not grade(host.filled_in(SOURCES[name]), TESTS, LIMITS, tier=weaker).passed
    assert grade(HONEST, TESTS, tier=weaker).passed
    assert host.harm() == []


def test_what_a_candidate_says_is_printable_in_the_result(tier: Tier) -> None:
    for name in ("lone-surrogates", "terminal-codes"):
        result = grade(SOURCES[name], TESTS, LIMITS, tier=tier)
        assert result.summary().isprintable()
        assert result.summary().encode()


def sandbox_runs() -> bool:
    """A process runs under the user id of a slot."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if FIRST_UID <= path.stat().st_uid < FIRST_UID + SLOTS:
                return True
    return False


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_killed_grader_takes_its_sandbox_with_it(tier: Tier) -> None:
    if os.geteuid() != 0:
        pytest.skip("without root a sandbox has no user id to find its processes by")
    pid = os.fork()
    if pid == 0:
        grade("import time\ndef f(x): time.sleep(60)", TESTS, Limits(wall_s=50, test_s=50), tier=tier)
        os._exit(0)
    assert eventually(sandbox_runs)
    time.sleep(0.2)  # so that the candidate runs and not only its sandbox
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert eventually(lambda: left_processes() == [])


def test_a_slot_is_in_use_while_it_is_held() -> None:
    with slot() as number:
        assert in_use(number)
    assert FIRST_UID + SLOTS < 65536
