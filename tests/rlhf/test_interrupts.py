"""Signals that end a run, sent to this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from rlhf.runtime.interrupts import SIGNALS, Interrupts


@pytest.fixture
def told() -> Iterator[list[str]]:
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may run them under nohup
    yield []
    for number, handler in before.items():
        signal.signal(number, handler)


def installed(told: list[str]) -> Interrupts:
    made = Interrupts(told.append)
    made.install()
    return made


@pytest.mark.parametrize("number", SIGNALS)
def test_between_stages_a_signal_interrupts_at_once(told: list[str], number: signal.Signals) -> None:
    installed(told)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert told == []


@pytest.mark.parametrize("number", SIGNALS)
def test_in_a_step_the_first_signal_is_a_request_and_the_second_interrupts(
    told: list[str], number: signal.Signals
) -> None:
    interrupts = installed(told)
    with interrupts.deferred(30.0):
        os.kill(os.getpid(), number)
        assert interrupts.requested
        assert told == [f"{number.name}: saves and ends after this step, or in 30 s; once more to end at once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_step_that_takes_longer_than_the_grace_period_is_interrupted(told: list[str]) -> None:
    def long_step() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt), installed(told).deferred(0.05):
        long_step()


def test_a_step_that_ends_in_time_is_not_interrupted_later(told: list[str]) -> None:
    interrupts = installed(told)
    with interrupts.deferred(0.05):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    assert interrupts.requested


def test_a_hangup_that_nohup_ignores_stays_ignored(told: list[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    installed(told)
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
