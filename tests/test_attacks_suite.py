"""The suite of attacks: what is in it, that one of each family gets nothing, and that it would tell if one did."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.attacks import __main__ as suite
from benchmarks.attacks.catalogue import Program, Text, everything, programs, texts
from benchmarks.attacks.host import Host
from benchmarks.attacks.run import HONEST, ProgramRunner, Result, TextRunner, allowed_next_s
from rewards.code import Tier
from rewards.code.tiers import ORDER, probe
from rewards.processes import ProcessPool

OF_PROGRAMS = {
    "atexit", "bombs", "credentials", "daemons", "deep recursion", "equal to everything", "exits", "forged output",
    "frames and gc", "killing parents", "links and fifos", "loops in c", "network", "odd numbers", "own subclasses",
    "pickles", "reading tests and jobs", "shadow modules", "swallowed signals", "system calls", "trace functions",
    "two answerers", "writing to the harness",
}  # fmt: skip
OF_TEXTS = {
    "code extraction", "format", "instruction following", "judge gates", "language consistency", "math",
    "multiple choice", "vision",
}  # fmt: skip


def first_of_each(cases: tuple[Program, ...] | tuple[Text, ...]) -> list[Program | Text]:
    attacks = [case for case in cases if not case.honest]
    return list({case.family: case for case in reversed(attacks)}.values())


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def programs_run(host: Host) -> ProgramRunner:
    tier = next((tier for tier in ORDER if probe(tier) is None), None)
    if tier is None:
        pytest.skip("no sandbox tier holds here")
    return ProgramRunner(tier, host)


@pytest.fixture(scope="module")
def texts_run(host: Host) -> Iterator[TextRunner]:
    with closing(ProcessPool(1, suite.GRADER_MEMORY_BYTES, ("benchmarks.attacks.gate_reward",))) as pool:
        yield TextRunner(pool, host)


def but_for_time(result: Result) -> list[str]:
    """The faults that a busy machine does not explain."""
    return [fault for fault in result.faults if not fault.startswith("the next job takes")]


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_every_family_has_three_attacks_and_something_honest() -> None:
    for cases, families in ((programs(), OF_PROGRAMS), (texts(), OF_TEXTS)):
        attacks = Counter(case.family for case in cases if not case.honest)
        assert set(attacks) == families
        assert min(attacks.values()) >= 3
        assert {case.family for case in cases if case.honest} == families


def test_there_are_a_hundred_attacks_on_the_code_reward_alone() -> None:
    assert sum(not case.honest for case in programs()) >= 100


def test_ids_are_unique_and_every_attack_says_what_it_tries() -> None:
    ids = [case.id for case in everything()]
    assert len(set(ids)) == len(ids)
    assert all(case.tries for case in everything())


def test_every_placeholder_is_known(host: Host) -> None:
    for case in everything():
        text = host.filled_in(case.source if isinstance(case, Program) else case.completion)
        assert not any(
            f"@{name}@" in text for name in ("CANARY", "PORT", "SECRET_FILE", "SECRET_NAME", "VICTIM", "SUITE")
        )


# --- that it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", first_of_each(programs()), ids=lambda case: case.id)
def test_a_program_of_each_family_gets_nothing_and_harms_nothing(attack: Program, programs_run: ProgramRunner) -> None:
    assert but_for_time(programs_run.run(attack)) == []


@pytest.mark.parametrize("attack", first_of_each(texts()), ids=lambda case: case.id)
def test_a_text_of_each_family_gets_nothing(attack: Text, texts_run: TextRunner) -> None:
    assert but_for_time(texts_run.run(attack)) == []


# --- that it would tell -----------------------------------------------------------------------------------------------


def test_a_program_that_solves_the_task_is_a_failed_attack_and_a_wrong_one_fails_as_honest(
    programs_run: ProgramRunner,
) -> None:
    paid = programs_run.run(Program("paid", "exits", "to be right", HONEST))
    assert "it passes" in paid.faults
    wrong = programs_run.run(Program("wrong", "exits", "", "def f(x): return 0", honest=True))
    assert "an honest solution fails" in wrong.faults


def test_what_a_program_does_without_a_sandbox_is_seen(host: Host) -> None:
    harmful = """
import os, socket
def f(x):
    open('@CANARY@/new', 'w').close()
    socket.create_connection(('127.0.0.1', @PORT@), 1)
    return open('@SECRET_FILE@').read()
"""
    with Host() as another:
        faults = (
            ProgramRunner(Tier.UNSAFE, another).run(Program("loose", "exits", "harm", harmful, task="secret")).faults
        )
    assert {"it passes", "the canary folder is changed", "a port was reached"} <= set(faults)


def test_a_text_that_is_paid_is_a_failed_attack(texts_run: TextRunner) -> None:
    result = texts_run.run(Text("paid", "math", "to be right", "math", r"\boxed{18}", answer="18"))
    assert but_for_time(result) == ["it gets 1"]


def test_the_next_job_may_take_three_times_the_median_or_50_ms() -> None:
    assert allowed_next_s(0.04) == pytest.approx(0.12)
    assert allowed_next_s(0.001) == 0.05


# --- what it writes ---------------------------------------------------------------------------------------------------


def result(name: str, **more: object) -> Result:
    given = {
        "honest": False,
        "paid": 0.0,
        "verdict": "strong: 0/2",
        "milliseconds": 20.0,
        "next_ms": 33.0,
        "next_ratio": 1.1,
    }
    given |= {"faults": (), "unharmed": True, "earned_nothing": True}
    return Result(name, "exits", "strong", **(given | more))  # type: ignore[arg-type]


def test_the_table_counts_and_the_failures_are_named() -> None:
    results = [result("one"), result("two", faults=("it passes",), earned_nothing=False, next_ms=75.0)]
    rows = [line.split() for line in suite.table([*results, result("three", honest=True)])]
    assert rows[1] == ["exits", "strong", "2", "1", "3/3", "1", "1", "20", "75"]
    assert [row[0] for row in rows[1:]] == ["exits", "all"]
    assert list(suite.failures(results)) == ["FAILED strong two: it passes (strong: 0/2)"]


def test_the_results_are_written_with_every_case(tmp_path: Path) -> None:
    suite.write(tmp_path / "results" / "attacks.json", [result("one")], {"strong": 0.03}, {"userns": "blocked"})
    written = json.loads((tmp_path / "results" / "attacks.json").read_text())
    assert written["failed"] == 0
    assert written["honest_job_median_ms"] == {"strong": 30.0}
    assert [case["id"] for case in written["cases"]] == ["one"]


def test_a_list_names_every_attack_and_runs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(everything())
