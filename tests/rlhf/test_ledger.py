"""Every dispatched group ends in one counted state, and its life can be told afterwards."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from rlhf.errors import DataError
from rlhf.ledger import FILE_NAME, STATES, Ledger, LedgerError, why

DETAILS = {"trained": 3, "filtered": "all_correct", "aborted": "surplus", "stale": 2, "lost": "engine-0"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def test_every_state_is_counted_and_the_counts_add_up(ledger: Ledger) -> None:
    for number, state in enumerate(STATES):
        ledger.dispatch(f"g{number}", version=number)
        ledger.close(f"g{number}", state, DETAILS.get(state))
    ledger.dispatch("open", version=9)
    ledger.check()
    counts = ledger.counts()
    assert counts.pop("filtered/all_correct") == 1
    assert counts == {"dispatched": len(STATES) + 1, "in_flight": 1, **dict.fromkeys(STATES, 1)}
    assert dict(ledger.in_flight) == {"open": 9}


def test_the_counts_add_up_after_every_event_of_a_random_run(ledger: Ledger) -> None:
    rng, wanted = random.Random(0), Counter()
    for number in range(300):
        ledger.dispatch(f"g{number}", version=number // 10)
        while ledger.in_flight and rng.random() < 0.5:
            state = rng.choice(STATES)
            ledger.close(rng.choice(list(ledger.in_flight)), state, DETAILS.get(state))
            wanted[state] += 1
        ledger.check()
    assert {state: ledger.counts()[state] for state in STATES} == {state: wanted[state] for state in STATES}


def test_filter_rules_are_counted_apart(ledger: Ledger) -> None:
    for number, rule in enumerate(["all_correct", "all_wrong", "all_correct"]):
        ledger.dispatch(f"g{number}", 0)
        ledger.close(f"g{number}", "filtered", rule)
    counts = ledger.counts()
    assert (counts["filtered"], counts["filtered/all_correct"], counts["filtered/all_wrong"]) == (3, 2, 1)


def test_closing_twice_is_an_error_that_names_the_first_state(ledger: Ledger) -> None:
    ledger.dispatch("a", 0)
    ledger.close("a", "abstained")
    with pytest.raises(LedgerError, match="group a cannot end as trained: it is closed as abstained"):
        ledger.close("a", "trained", 1)
    ledger.check()


def test_closing_an_unknown_group_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="not known here"):
        ledger.close("ghost", "abstained")


def test_dispatching_what_is_in_flight_is_an_error(ledger: Ledger) -> None:
    ledger.dispatch("a", 4)
    with pytest.raises(LedgerError, match="in flight since version 4"):
        ledger.dispatch("a", 5)


def test_memory_is_that_of_the_groups_in_flight(ledger: Ledger) -> None:
    for number in range(1000):
        ledger.dispatch(f"g{number}", 0)
        ledger.close(f"g{number}", "filtered", "all_wrong")
    assert not ledger.in_flight
    sizes = [len(value) for value in vars(ledger).values() if isinstance(value, dict)]
    assert max(sizes) <= 1


@pytest.mark.parametrize("state", ["trained", "filtered", "stale", "lost"])
def test_a_state_without_its_detail_is_an_error_and_leaves_the_group_open(ledger: Ledger, state: str) -> None:
    ledger.dispatch("a", 0)
    with pytest.raises(LedgerError, match="without its"):
        ledger.close("a", state)  # type: ignore[arg-type]
    assert "a" in ledger.in_flight


def test_a_detail_of_zero_is_a_detail(ledger: Ledger) -> None:
    ledger.dispatch("a", 0)
    ledger.close("a", "trained", 0)
    assert ledger.history("a")[-1].detail == 0


def test_check_finds_counts_that_do_not_add_up(ledger: Ledger) -> None:
    ledger.dispatch("a", 0)
    ledger._in_flight.clear()
    with pytest.raises(LedgerError, match="dispatched"):
        ledger.check()


def test_the_life_of_a_group_can_be_told_from_the_file(ledger: Ledger, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ledger.dispatch(name, 7)
    ledger.close("a", "filtered", "all_wrong")
    told = why(tmp_path, "a").splitlines()
    assert told[0] == "group a"
    assert "dispatched at weight version 7" in told[1]
    assert "filtered (rule all_wrong)" in told[2]
    assert "still in flight" in why(tmp_path, "b")


def test_an_unknown_group_gets_the_nearest_name(ledger: Ledger, tmp_path: Path) -> None:
    ledger.dispatch("g000017", 0)
    with pytest.raises(DataError, match="Did you mean g000017"):
        why(tmp_path, "g00017")


def test_a_run_without_ledger_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        why(tmp_path, "a")


def test_a_resumed_run_appends_and_cuts_the_line_a_kill_left_unfinished(ledger: Ledger, tmp_path: Path) -> None:
    ledger.dispatch("a", 0)
    ledger.shutdown()
    path = tmp_path / FILE_NAME
    with path.open("a") as file:
        file.write('{"group_id": "b", "ev')
    resumed = Ledger(tmp_path)
    resumed.dispatch("a", 1)
    assert resumed.counts()["dispatched"] == 1
    assert [json.loads(line)["version"] for line in path.read_text().splitlines()] == [0, 1]
    assert [event.version for event in resumed.history("a")] == [0, 1]


def test_a_damaged_line_is_named_by_number(ledger: Ledger, tmp_path: Path) -> None:
    ledger.dispatch("a", 0)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=r"ledger\.jsonl:2: not a JSON line"):
        why(tmp_path, "a")
