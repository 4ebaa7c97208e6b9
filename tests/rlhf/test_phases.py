from __future__ import annotations

import time

import pytest

from rlhf.gpu_turns import EngineTurns
from rlhf.phases import Phases


def test_a_phase_is_timed_in_the_step_and_in_total() -> None:
    phase = Phases()
    for _ in range(2):
        phase.start_step()
        with phase("update"):
            time.sleep(0.01)
        with phase("update"):
            time.sleep(0.01)
    assert 0.02 <= phase.step["update"] < 2.0
    assert phase.total["update"] == pytest.approx(phase.step["update"], rel=1.0, abs=0.04)
    assert phase.total["update"] >= 0.04


def test_a_new_step_starts_at_zero_and_the_total_goes_on() -> None:
    phase = Phases()
    with phase("sync"):
        pass
    phase.start_step()
    assert phase.step == {}
    assert set(phase.total) == {"sync"}


def test_an_error_says_in_which_phase_it_happened() -> None:
    phase = Phases()
    with pytest.raises(ValueError, match="broken") as caught, phase("rollout"):
        raise ValueError("broken")
    [note] = caught.value.__notes__
    assert note.startswith("in phase rollout, after 0.")


class Engines:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")


def test_engines_that_share_a_gpu_sleep_only_while_the_learner_computes() -> None:
    engines = Engines()
    phase = Phases(EngineTurns(engines))
    for _ in range(2):
        for name in ("rollout", "annotate", "advantage", "update", "sync"):
            with phase(name):
                engines.calls.append(name)
    step = ["rollout", "sleep", "annotate", "advantage", "update", "wake", "sync"]
    assert engines.calls == step * 2


def test_an_engine_that_cannot_wake_is_reported_with_the_phase() -> None:
    class Broken(Engines):
        def wake(self) -> None:
            raise RuntimeError("cannot wake")

    phase = Phases(EngineTurns(Broken()))
    with phase("update"):
        pass
    with pytest.raises(RuntimeError, match="cannot wake") as caught, phase("sync"):
        pass
    assert "in phase sync" in caught.value.__notes__[0]
