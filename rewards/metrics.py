"""What a scorer has done, counted by component."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from rewards.child import Answer
from rewards.registry import Abstain

WINDOW = 1024  # latest calls that the latency percentiles are over


@dataclass(slots=True)
class Tally:
    """Of one component: calls made, seconds of the latest, and what became of the samples."""

    calls: int = 0
    cache_hits: int = 0
    retries: int = 0
    abstained: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def metrics(self) -> dict[str, float]:
        out: dict[str, float] = {name: getattr(self, name) for name in ("calls", "cache_hits", "retries", "abstained")}
        out |= {f"errors/{kind}": count for kind, count in sorted(self.errors.items())}
        if self.seconds:
            ordered = sorted(self.seconds)
            out |= {f"latency_p{q}_s": ordered[-(-len(ordered) * q // 100) - 1] for q in (50, 99)}
        return out


class ScorerMetrics:
    """Counts since the start. Thread-safe. `queue` is the number of calls accepted and not yet answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[str, Tally] = {}
        self._queue = 0

    def queued(self, calls: int) -> None:
        with self._lock:
            self._queue += calls

    def called(self, component: str, answer: Answer, *, retry: bool) -> None:
        """One attempt; its failures, if any, are errors whether or not another attempt follows."""
        with self._lock:
            tally = self._tallies.setdefault(component, Tally())
            tally.calls += 1
            tally.retries += retry
            tally.seconds.append(answer.seconds)
            if answer.failure is not None:
                tally.errors[answer.failure.kind] += 1

    def answered(self, component: str, answer: Answer, *, cached: bool) -> None:
        """The last word on a call, from the cache or not."""
        with self._lock:
            tally = self._tallies.setdefault(component, Tally())
            tally.cache_hits += cached
            tally.abstained += sum(isinstance(verdict, Abstain) for verdict in answer.verdicts)

    def metrics(self) -> Mapping[str, float]:
        """`reward_service/<component>/<name>` and `reward_service/queue`."""
        with self._lock:
            tallies = {name: tally.metrics() for name, tally in sorted(self._tallies.items())}
            flat = {f"reward_service/{name}/{key}": value for name, of in tallies.items() for key, value in of.items()}
            return flat | {"reward_service/queue": self._queue}
