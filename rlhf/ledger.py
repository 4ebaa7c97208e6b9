"""What became of every dispatched group. The states add up to what was dispatched, and `check` proves it.

dispatched -> in flight -> trained(step) | filtered(rule) | abstained | reward_error | aborted(reason) | stale(lag)
                           | lost(worker)
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf import jsonl
from rlhf.errors import DataError, did_you_mean
from rlhf.samples import WeightVersion

State = Literal["trained", "filtered", "abstained", "reward_error", "aborted", "stale", "lost"]
STATES: tuple[State, ...] = get_args(State)
FILE_NAME = "ledger.jsonl"

_DETAIL_NAMES: Mapping[State, str] = {
    "trained": "step",
    "filtered": "rule",
    "aborted": "reason",
    "stale": "lag",
    "lost": "worker",
}


class LedgerError(AssertionError):
    """Our own bookkeeping is wrong: a group was closed twice or never dispatched, or the counts do not add up."""


@dataclass(frozen=True, slots=True)
class Event:
    """`event` is `dispatched` or a closing state; `detail` the step, rule, lag in versions or worker that goes with it.

    `version` is the learner's weight version at dispatch, None on closing events. `time_s` is Unix time in seconds.
    """

    group_id: str
    event: str
    detail: str | int | None
    version: WeightVersion | None
    time_s: float


class Ledger:
    """Counts in memory, events in `run_dir/ledger.jsonl`. One writing process; its threads may share it.

    Memory is that of the groups in flight.
    """

    def __init__(self, run_dir: Path, state: Mapping[str, Any] | None = None) -> None:
        """With `state`, a `state_dict`, go on from it: groups that were in flight then are lost."""
        self._file = jsonl.JsonLines(run_dir / FILE_NAME)
        saved = state or {}
        self._dispatched: int = saved.get("dispatched", 0)
        self._in_flight: dict[str, WeightVersion] = dict(saved.get("in_flight", {}))
        self._states: Counter[str] = Counter(saved.get("states", {}))
        self._rules: Counter[str] = Counter(saved.get("rules", {}))
        self._lock = threading.Lock()
        for group_id in list(self._in_flight):
            self.close(group_id, "lost", "restart")

    def state_dict(self) -> dict[str, Any]:
        """The counts and the groups in flight, and how many bytes the file has with them."""
        with self._lock:
            return {
                "dispatched": self._dispatched,
                "in_flight": dict(self._in_flight),
                "states": dict(self._states),
                "rules": dict(self._rules),
                "bytes": self._file.size,
            }

    def dispatch(self, group_id: str, version: WeightVersion) -> None:
        """`group_id`, a new one, is in flight, sampled from `version` or later. LedgerError if it is in flight."""
        with self._lock:
            if group_id in self._in_flight:
                raise LedgerError(f"group {group_id} was dispatched twice; it is {self._state_of(group_id)}")
            self._write(Event(group_id, "dispatched", None, version, time.time()))
            self._dispatched += 1
            self._in_flight[group_id] = version

    def close(self, group_id: str, state: State, detail: str | int | None = None) -> None:
        """`group_id` has ended as `state`. LedgerError if it is not in flight or the state lacks its detail."""
        with self._lock:
            if group_id not in self._in_flight:
                raise LedgerError(f"group {group_id} cannot end as {state}: it is {self._state_of(group_id)}")
            _check_detail(group_id, state, detail)
            self._write(Event(group_id, state, detail, None, time.time()))
            del self._in_flight[group_id]
            self._states[state] += 1
            if state == "filtered":
                self._rules[str(detail)] += 1

    @property
    def in_flight(self) -> Mapping[str, WeightVersion]:
        """Group id -> weight version at dispatch, oldest first."""
        return self._in_flight

    def counts(self) -> dict[str, int]:
        """`dispatched`, `in_flight`, every closing state (also at 0) and `filtered/<rule>` for the rules seen."""
        with self._lock:
            states = {state: self._states[state] for state in STATES}
            rules = {f"filtered/{rule}": count for rule, count in sorted(self._rules.items())}
            return {"dispatched": self._dispatched, "in_flight": len(self._in_flight), **states, **rules}

    def check(self) -> None:
        """Raises LedgerError unless in flight + closed = dispatched, and the rules add up to the filtered groups.

        The cost does not grow with the groups.
        """
        counts = self.counts()
        closed = sum(counts[state] for state in STATES)
        if counts["in_flight"] + closed != counts["dispatched"]:
            raise LedgerError(f"{counts['in_flight']} in flight + {closed} closed != dispatched: {counts}")
        if sum(count for name, count in counts.items() if name.startswith("filtered/")) != counts["filtered"]:
            raise LedgerError(f"the filter rules do not add up to the filtered groups: {counts}")

    def history(self, group_id: str) -> tuple[Event, ...]:
        """All events of `group_id`, oldest first, those of earlier processes of this run included."""
        return history(self._file.path, group_id)

    def shutdown(self) -> None:
        """The file is closed. Groups still in flight stay so in the record: that is how they ended."""
        self._file.close()

    def _write(self, event: Event) -> None:
        self._file.append(asdict(event))

    def _state_of(self, group_id: str) -> str:
        if group_id in self._in_flight:
            return f"in flight since version {self._in_flight[group_id]}"
        events = self.history(group_id)
        return f"closed as {events[-1].event}" if events else "not known here"


def history(path: Path, group_id: str) -> tuple[Event, ...]:
    """All events of `group_id` in the ledger file `path`, oldest first; empty for an unknown id."""
    return tuple(Event(**record) for record in jsonl.read(path) if record["group_id"] == group_id)


def why(run_dir: Path, group_id: str) -> str:
    """The life of one group in readable lines. DataError, with the nearest id, if the run never dispatched it."""
    path = run_dir / FILE_NAME
    if not path.exists():
        raise DataError(f"{path}: no such file. Give the directory of a run that reached its RL stage.")
    events = history(path, group_id)
    if not events:
        raise DataError(_unknown(path, group_id))
    lines = [f"group {group_id}"]
    lines += [_tell(event, events[max(index - 1, 0)]) for index, event in enumerate(events)]
    if events[-1].event == "dispatched":
        lines.append("  still in flight where the record ends")
    return "\n".join(lines)


def _tell(event: Event, previous: Event) -> str:
    clock = datetime.fromtimestamp(event.time_s).strftime("%H:%M:%S")
    if event.event == "dispatched":
        return f"  {clock}  dispatched at weight version {event.version}"
    name = _DETAIL_NAMES.get(event.event, "")  # type: ignore[call-overload]
    detail = f" ({name} {event.detail})" if name else f" ({event.detail})" if event.detail else ""
    return f"  {clock}  {event.event.replace('_', ' ')}{detail}, {event.time_s - previous.time_s:.2f} s later"


def _unknown(path: Path, group_id: str) -> str:
    known = list({str(record["group_id"]): None for record in jsonl.read(path)})
    hint = did_you_mean(group_id, known, "Its ledger.jsonl has them.")
    return f"group {group_id}: not one of the {len(known)} groups in {path}. {hint}"


def _check_detail(group_id: str, state: Any, detail: str | int | None) -> None:
    if state not in STATES:
        raise LedgerError(f"group {group_id} cannot end as {state!r}; the states are {', '.join(STATES)}")
    if state in _DETAIL_NAMES and detail in (None, ""):
        raise LedgerError(f"group {group_id} ends as {state} without its {_DETAIL_NAMES[state]}")
