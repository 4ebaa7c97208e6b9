"""Programs that try to be paid without solving the task: each gets nothing, leaves nothing, and disturbs no one."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from rewards.code import Limits, Options, Tier, grade, parse
from rewards.code.slots import FIRST_UID, SLOTS
from rewards.code.tiers import ORDER, probe

TESTS = parse({"tests": [{"call": "f", "args": [n], "expected": [n * 1001, str(n)]} for n in (3, 5)]})
HONEST = "def f(x): return [x * 1001, str(x)]"
LIMITS = Limits(wall_s=5, test_s=2.0, memory_bytes=128 << 20, processes=16)

PROGRAMS = Path(__file__).with_name("code_attacks.txt").read_text()
ATTACKS = dict(re.findall(r"^=== (.+)\n((?:(?!=== ).*\n)+)", PROGRAMS, re.MULTILINE))


@pytest.fixture(scope="module")
def tier() -> Tier:
    found = next((tier for tier in ORDER if probe(tier) is None), None)
    if found is None:
        pytest.skip("no sandbox tier holds here")
    return found


def left_behind() -> list[str]:
    """Processes of sandbox users and of this one that are left, and files in the machine's /tmp."""
    left = [str(path) for path in map(Path, ("/tmp/pwned", "/tmp/groupwise", "/usr/groupwise")) if path.exists()]
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if FIRST_UID <= path.stat().st_uid < FIRST_UID + SLOTS:
                left.append((path / "cmdline").read_text()[:200])
        except OSError:
            continue
    return left


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_nothing_and_leaves_nothing(name: str, tier: Tier) -> None:
    result = grade(ATTACKS[name], TESTS, LIMITS, Options(stop_at_first=False), tier)
    assert not result.passed
    # "answers twice" gives right answers; what matters is that it does not get them all counted
    assert result.passed_fraction == 0 or name == "answers twice"
    assert result.elapsed_s < LIMITS.wall_s + 15
    assert grade(HONEST, TESTS, tier=tier).passed
    if os.geteuid() == 0:
        assert left_behind() == []


@pytest.mark.parametrize("weaker", [Tier.USERNS, Tier.LANDLOCK])
@pytest.mark.parametrize("name", ["fork bomb", "memory bomb of many", "daemon", "kills everyone", "answers twice"])
def test_the_weaker_tiers_hold_too(name: str, weaker: Tier) -> None:
    if (problem := probe(weaker)) is not None:
        pytest.skip(f"{weaker}: {problem}")
    assert not grade(ATTACKS[name], TESTS, LIMITS, tier=weaker).passed
    assert grade(HONEST, TESTS, tier=weaker).passed
    if os.geteuid() == 0:
        assert left_behind() == []


def test_a_killed_grader_takes_its_sandbox_with_it(tier: Tier) -> None:
    if os.geteuid() != 0:
        pytest.skip("without root a sandbox has no user id to find its processes by")
    pid = os.fork()
    if pid == 0:
        grade("import time\ndef f(x): time.sleep(60)", TESTS, Limits(wall_s=50, test_s=50), tier=tier)
        os._exit(0)
    deadline = time.monotonic() + 10
    while not left_behind() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while left_behind() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_behind() == []
