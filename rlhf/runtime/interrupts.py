"""SIGTERM, SIGHUP and Ctrl-C: at once, or after the step that is being made."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Raises KeyboardInterrupt on a signal. While a step is being made, the first signal only sets `requested`.

    Whoever makes the step then saves it and stops. After a grace period, or on a second signal, it is interrupted. For
    the main thread.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.requested = False
        self._report = report
        self._grace_s: float | None = None  # None: at once

    def install(self) -> None:
        """Take over the signals; one that the process was told to ignore, as under nohup, stays ignored."""
        for number in SIGNALS:
            # A shell without job control starts background commands with SIGINT ignored; `kill -INT` must end the run.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._received)
        signal.signal(signal.SIGALRM, self._raise)

    @contextmanager
    def deferred(self, grace_s: float) -> Iterator[None]:
        """In the block steps are made that can be saved; a signal waits for one up to `grace_s` seconds."""
        self._grace_s = grace_s
        try:
            yield
        finally:
            self._grace_s = None
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self._grace_s is None:
            raise KeyboardInterrupt
        self.requested = True
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        name = signal.Signals(number).name
        self._report(f"{name}: saves and ends after this step, or in {self._grace_s:g} s; once more to end at once")

    def _raise(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
