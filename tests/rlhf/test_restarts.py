"""A run that lost a process goes on as long as it gets further, and no longer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlhf.errors import AttestationError, DeadlineError, GroupwiseError, ProcessLostError, WorkerLostError
from rlhf.runtime.restarts import with_restarts


class Run:
    """Attempts that end as `ends` says: how far the run is saved then, and with which error."""

    def __init__(self, *ends: tuple[str | None, GroupwiseError | None]) -> None:
        self.ends: Iterator[tuple[str | None, GroupwiseError | None]] = iter(ends)
        self.saved: str | None = None
        self.attempts = 0
        self.told: list[str] = []

    def attempt(self) -> None:
        self.attempts += 1
        self.saved, error = next(self.ends)
        if error is not None:
            raise error

    def go(self, most: int = 2) -> None:
        with_restarts(self.attempt, lambda: self.saved, most, self.told.append)


@pytest.mark.parametrize("error", [ProcessLostError("learner-0 died"), DeadlineError("nothing came back")])
def test_a_lost_process_and_a_deadline_restart_a_run_that_was_saved(error: GroupwiseError) -> None:
    run = Run(("step 3", error), ("step 9", None))
    run.go()
    assert run.attempts == 2
    assert run.told == [f"{error}\nrestarts from step 3; 2 more restarts without progress"]


def test_a_run_that_saved_nothing_says_at_once_that_it_cannot_start() -> None:
    run = Run((None, ProcessLostError("out of memory")))
    with pytest.raises(ProcessLostError):
        run.go()
    assert run.attempts == 1


@pytest.mark.parametrize("error", [WorkerLostError("raised"), AttestationError("other weights")])
def test_other_errors_would_come_again_and_end_the_run(error: GroupwiseError) -> None:
    run = Run(("step 3", error))
    with pytest.raises(type(error)):
        run.go()
    assert run.attempts == 1


def test_restarts_are_limited_in_a_row_without_progress_and_not_with_it() -> None:
    lost = ProcessLostError("gone")
    run = Run(*((f"step {number}", lost) for number in range(5)), ("step 4", lost), ("step 4", lost))
    with pytest.raises(ProcessLostError):
        run.go(most=2)
    assert run.attempts == 7


def test_a_limit_of_zero_never_restarts() -> None:
    run = Run(("step 3", ProcessLostError("gone")))
    with pytest.raises(ProcessLostError):
        run.go(most=0)
