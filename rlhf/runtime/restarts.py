"""A run that lost a process, or waits for one in vain, ends all its processes and goes on from where it was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rlhf.errors import DeadlineError, ProcessLostError

Position = TypeVar("Position")


def with_restarts(
    attempt: Callable[[], None],
    position: Callable[[], Position | None],
    most: int,
    report: Callable[[str], None],
) -> None:
    """Call `attempt` until it returns, and again when a process of it was lost or a wait passed its deadline.

    `position` says how far the run is saved, None where it is not. The error is raised where nothing was saved yet, so
    that a run that cannot start says so at once, and after `most` restarts in a row that got no further.
    """
    before, fruitless = position(), 0
    while True:
        try:
            return attempt()
        except (ProcessLostError, DeadlineError) as error:
            reached = position()
            fruitless = fruitless + 1 if reached == before else 0
            if reached is None or fruitless >= most:
                raise
            before = reached
            left = most - fruitless
            report(f"{error}\nrestarts from {reached}; {left} more restart{'s' * (left != 1)} without progress")
