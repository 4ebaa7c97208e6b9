"""Keeps rollouts flowing with a hard bound on how old a trained sample can be.

At most `(max_staleness + 1) * prompts_per_step` groups are alive: dispatched and not yet trained or closed. They are
taken oldest first, so a group has fewer than that many before it and is trained at most `max_staleness` versions after
it was dispatched. The bound holds by construction and is checked when a group is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from rlhf.errors import DeadlineError, GroupwiseError, RewardFailureError
from rlhf.ledger import Ledger
from rlhf.samples import Prompt, ScoredGroup
from rlhf.selection import Arrivals, Rejected


class Dispatcher(Protocol):
    """Sends a prompt off to be sampled and scored; gives back what has finished since the last call."""

    def submit(self, group_id: str, prompt: Prompt) -> None: ...

    def completed(self, timeout_s: float) -> list[ScoredGroup]:
        """Waits for at least one group. Empty only after `timeout_s`. Raises a worker's failure."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds an RL stage. `name` begins every group id.

    `total_groups` is what the stage trains in all: no more are ever waited for. One step dispatches at most
    `max_dispatch_factor * prompts_per_step`; `error_budget` is the share of failed rewards that stops the run.
    """

    name: str
    prompts_per_step: int
    max_staleness: int
    total_groups: int
    max_dispatch_factor: int
    error_budget: float
    deadline_s: float


class StalenessBuffer:
    """`RolloutSource` over a dispatcher. Each group it dispatches ends in exactly one state of the ledger."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        prompts: Iterator[Prompt],
        select: Callable[[ScoredGroup], Rejected | None],
        ledger: Ledger,
        limits: Limits,
    ) -> None:
        self._dispatcher = dispatcher
        self._prompts = prompts
        self._select = select
        self._ledger = ledger
        self._limits = limits
        self._untaken = limits.total_groups
        self._waiting: dict[str, ScoredGroup | None] = {}  # by age; None while in flight
        self._dispatched = self._number = 0
        self.arrived = Arrivals()
        self.sampled_tokens = 0

    @property
    def _max_dispatch(self) -> int:
        return self._limits.max_dispatch_factor * self._limits.prompts_per_step

    @property
    def capacity(self) -> int:
        return (self._limits.max_staleness + 1) * self._limits.prompts_per_step

    def take(self, version: int) -> list[ScoredGroup]:
        """The next `prompts_per_step` trainable groups, oldest first.

        Fewer, but at least one, when `max_dispatch_factor` times as many prompts were tried. Raises GroupwiseError when
        none of those was trainable, RewardFailureError above the error budget, DeadlineError when nothing comes back.
        """
        self._dispatched, self.arrived = 0, Arrivals()
        while True:
            self._fill(version)
            groups = self._oldest_ready()
            if groups is not None:
                return [self._checked(group, version) for group in groups]
            finished = self._dispatcher.completed(self._limits.deadline_s)
            if not finished:
                raise DeadlineError(self._overdue())
            for group in finished:
                self._receive(group)

    def _fill(self, version: int) -> None:
        # Groups that were taken and not yet trained are alive too: the ledger still has them in flight.
        while (
            len(self._ledger.in_flight) < self.capacity
            and len(self._waiting) < self._untaken
            and self._dispatched < self._max_dispatch
        ):
            group_id = f"{self._limits.name}-{self._number:06d}"
            self._number += 1
            self._dispatched += 1
            self._ledger.dispatch(group_id, version)
            self._waiting[group_id] = None
            self._dispatcher.submit(group_id, next(self._prompts))

    def _oldest_ready(self) -> list[ScoredGroup] | None:
        oldest = list(self._waiting.items())[: self._limits.prompts_per_step]
        groups = [group for _, group in oldest if group is not None]
        wanted = min(self._limits.prompts_per_step, self._untaken)
        if len(groups) < len(oldest) or (len(groups) < wanted and self._dispatched < self._max_dispatch):
            return None
        if not groups:
            raise GroupwiseError(
                f"rollouts.max_dispatch_factor: {self._dispatched} prompts were sampled for one step and none was "
                f"trainable ({self._ledger.counts()}). Nothing is left to learn here, or everything is too hard: "
                "change the data or its difficulty, or raise rollouts.group_size."
            )
        for group_id, _ in oldest:
            del self._waiting[group_id]
        self._untaken -= self._limits.prompts_per_step
        return groups

    def _receive(self, scored: ScoredGroup) -> None:
        self.arrived.add(scored)
        self.sampled_tokens += sum(sample.completion_tokens for sample in scored.group.samples)
        group_id = scored.group.group_id
        rejected = self._select(scored)
        if rejected is None:
            self._waiting[group_id] = scored
        else:
            self._ledger.close(group_id, rejected.state, rejected.detail)
            del self._waiting[group_id]
        of_a_step = max(self.arrived.groups, self._limits.prompts_per_step) * len(scored.outcomes)
        if scored.failure_report and self.arrived.failed > self._limits.error_budget * of_a_step:
            raise RewardFailureError(self._over_budget(scored))

    def _checked(self, group: ScoredGroup, version: int) -> ScoredGroup:
        lag = version - group.group.first_version
        assert 0 <= lag <= self._limits.max_staleness, f"group {group.group.group_id} is {lag} versions old"
        return group

    def _over_budget(self, scored: ScoredGroup) -> str:
        return (
            f"rewards.error_budget = {self._limits.error_budget}: {self.arrived.failed} of "
            f"{len(self.arrived.completion_tokens)} rewards of this step failed. Last: {scored.failure_report}"
        )

    def _overdue(self) -> str:
        missing = [group_id for group_id, group in self._waiting.items() if group is None]
        return (
            f"rollouts.silence_deadline_s = {self._limits.deadline_s:g}: nothing came back for that long, with "
            f"{len(missing)} groups in flight, the oldest {missing[0]}. An engine or a reward worker is stuck: see "
            "logs/engine-*.log. If completions really take that long, raise it."
        )
