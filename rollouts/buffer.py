"""Admission and selection of groups under a hard bound on the age of a trained token.

A group's deadline is the last weight version that may train it: the version its oldest token was sampled from, or while
it is in flight the one it was dispatched at, plus `max_staleness`. Every version takes `prompts_per_step` groups, those
of the earliest deadlines. The invariant: for each version d, the groups alive whose deadline is d or earlier are no
more than the takes up to d can train.

* Admission keeps it: a group is dispatched only while all groups alive fit the takes up to its own deadline.
* A take keeps it: it waits until it can remove, for each d, what the takes after it could not.

So a group is never too old when it is taken, and no finished work is thrown away for its age: the bound is kept by
pacing. With `max_staleness: 0`, and in the last step of a stage, groups beyond the need are dispatched, because many
are filtered; what is not needed in the end is aborted.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.errors import GroupwiseError, RewardFailureError
from rlhf.ledger import Ledger
from rlhf.protocols import Taken
from rlhf.samples import SampleGroup, ScoredGroup, WeightVersion
from rlhf.selection import Arrivals, Rejected

LatePolicy = Literal["wait", "mask", "abort"]
_MEMORY = 4.0  # steps of arrivals that the acceptance rate is an average over
_MIN_ACCEPTANCE = 0.05


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds an RL stage. `name` begins every group id.

    `total_groups` is what the stage trains in all: no more are ever waited for. Groups are kept alive for at most
    `pipeline_depth` steps ahead. Between two takes at most `max_dispatch_factor * prompts_per_step` are dispatched;
    `error_budget` is the share of failed rewards that stops the run. `late_groups`: a group in flight that would be too
    old for the step after this one is waited for, aborted, or goes on and loses the tokens that are too old.
    """

    name: str
    prompts_per_step: int
    max_staleness: int
    pipeline_depth: int
    total_groups: int
    max_dispatch_factor: int
    error_budget: float
    late_groups: LatePolicy = "wait"


class StalenessBuffer:
    """Groups from dispatch to training. Each ends in exactly one state of the ledger. For one thread."""

    def __init__(
        self,
        select: Callable[[ScoredGroup], Rejected | None],
        ledger: Ledger,
        limits: Limits,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """With `state`, a `state_dict`, go on from it; what was alive then is gone."""
        self._select = select
        self._ledger = ledger
        self._limits = limits
        self._version: WeightVersion = 0  # that the engines hold
        self._next_take: WeightVersion = 0
        self._flying: dict[str, WeightVersion] = {}
        self._ready: dict[str, tuple[WeightVersion, ScoredGroup]] = {}  # with its deadline
        self._alive: Counter[WeightVersion] = Counter()  # by deadline
        saved = state or {}
        self._left: int = saved.get("left", limits.total_groups)
        self._number: int = saved.get("number", 0)
        self._dispatched = 0
        # Of the latest arrivals; one accepted group before the first.
        self._accepted, self._judged = saved.get("acceptance", (1.0, 1.0))
        self._arrived = Arrivals()
        self._aborted: Counter[str] = Counter()
        self._aborted_tokens = 0

    def state_dict(self) -> dict[str, Any]:
        """What decides how the stage goes on, but for the groups themselves."""
        return {"left": self._left, "number": self._number, "acceptance": [self._accepted, self._judged]}

    @property
    def alive(self) -> Iterable[str]:
        """The groups that are in flight or wait to be trained."""
        return itertools.chain(self._flying, self._ready)

    # --- dispatch -----------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> Iterable[str]:
        """The groups that were dispatched and have not come back, oldest first."""
        return self._flying

    @property
    def acceptance(self) -> float:
        """Share of the latest groups that can train."""
        return self._accepted / self._judged

    def advance(self, version: WeightVersion) -> None:
        """The engines hold `version`, attested."""
        self._version = version
        self._next_take = max(self._next_take, version)
        if self._limits.late_groups == "mask":
            for group_id, before in self._flying.items():
                self._alive[before + self._limits.max_staleness] -= 1
                self._alive[version + self._limits.max_staleness] += 1
                self._flying[group_id] = version
            self._drop_unusable(version)

    def wanted(self) -> int:
        """Number of groups to dispatch now."""
        limits = self._limits
        steps = min(limits.pipeline_depth, self._version + limits.max_staleness - self._next_take + 1)
        places = min(steps * limits.prompts_per_step, self._left)
        missing = places - len(self._ready)
        if steps == 1 and (limits.max_staleness == 0 or self._left <= limits.prompts_per_step):
            missing = math.ceil(missing / max(self.acceptance, _MIN_ACCEPTANCE))
        allowed = limits.max_dispatch_factor * limits.prompts_per_step - self._dispatched
        return max(0, min(missing - len(self._flying), allowed)) if places > len(self._ready) else 0

    def dispatch(self) -> str:
        """The id of a new group, which is in flight from now on."""
        group_id = f"{self._limits.name}-{self._number:06d}"
        self._number += 1
        self._dispatched += 1
        self._ledger.dispatch(group_id, self._version)
        self._flying[group_id] = self._version
        self._alive[self._version + self._limits.max_staleness] += 1
        return group_id

    # --- what comes back ----------------------------------------------------------------------------------------------

    def receive(self, scored: ScoredGroup) -> None:
        """A group came back scored. Raises RewardFailureError above the error budget."""
        group_id = scored.group.group_id
        self._arrived.add(scored)
        self._land(group_id)
        rejected = self._select(scored)
        self._learn_acceptance(accepted=rejected is None)
        if rejected is None:
            deadline = self._usable_from(scored.group) + self._limits.max_staleness
            self._ready[group_id] = (deadline, scored)
            self._alive[deadline] += 1
        else:
            self._ledger.close(group_id, rejected.state, rejected.detail)
        of_a_step = max(self._arrived.groups, self._limits.prompts_per_step) * len(scored.outcomes)
        if scored.failed and self._arrived.failed > self._limits.error_budget * of_a_step:
            raise RewardFailureError(
                f"rewards.error_budget = {self._limits.error_budget}: {self._arrived.failed} of "
                f"{len(self._arrived.completion_tokens)} rewards of this step failed. Last: {scored.failure_report}"
            )

    def aborted(self, group_id: str, reason: str, completion_tokens: int) -> None:
        """A group in flight was aborted after so many tokens of all its completions."""
        self._land(group_id)
        self._close_aborted(group_id, reason, completion_tokens)

    def _land(self, group_id: str) -> None:
        self._alive[self._flying.pop(group_id) + self._limits.max_staleness] -= 1

    def _usable_from(self, group: SampleGroup) -> WeightVersion:
        """The version that decides how long the group trains: of its oldest token, or of its newest when others go."""
        if self._limits.late_groups != "mask":
            return group.first_version
        return max(sample.version_spans[-1].version for sample in group.samples if sample.version_spans)

    def _close_aborted(self, group_id: str, reason: str, completion_tokens: int) -> None:
        self._ledger.close(group_id, "aborted", reason)
        self._aborted[reason] += 1
        self._aborted_tokens += completion_tokens

    def _learn_acceptance(self, *, accepted: bool) -> None:
        kept = 1.0 - 1.0 / (_MEMORY * self._limits.prompts_per_step)
        self._accepted = kept * self._accepted + accepted
        self._judged = kept * self._judged + 1.0

    # --- a step -------------------------------------------------------------------------------------------------------

    def take(self, version: WeightVersion) -> Taken | None:
        """The groups of the step at `version`, the learner's; None while too few have come back.

        They are `prompts_per_step`, or fewer but at least one when `max_dispatch_factor` times as many prompts were
        tried. Raises GroupwiseError when none of those is trainable.
        """
        self.advance(version)
        wanted = min(self._limits.prompts_per_step, self._left)
        exhausted = not self._flying and not self.wanted()
        if len(self._ready) < wanted and not exhausted:
            return None
        if not self._ready:
            raise GroupwiseError(
                f"rollouts.max_dispatch_factor: {self._dispatched} prompts were sampled for one step and none was "
                f"trainable ({self._ledger.counts()}). Nothing is left to learn here, or everything is too hard: "
                "change the data or its difficulty, or raise rollouts.group_size."
            )
        if self.must_wait(version):
            return None
        earliest = sorted(self._ready.items(), key=lambda item: item[1][0])[:wanted]
        groups = []
        for group_id, (deadline, scored) in earliest:
            assert deadline >= version, f"group {group_id} may train until version {deadline}, not at {version}"
            del self._ready[group_id]
            self._alive[deadline] -= 1
            groups.append(scored)
        self._alive = +self._alive
        self._next_take = version + 1
        self._left -= self._limits.prompts_per_step
        return Taken(groups, *self._figures())

    def must_wait(self, version: WeightVersion) -> bool:
        """Groups in flight have to train in this step: later ones have no place for them before they are too old.

        So with `late_groups: wait`. The surplus of a step that was over-dispatched is not waited for.
        """
        limits = self._limits
        over_dispatched = limits.max_staleness == 0 or self._left <= limits.prompts_per_step
        return limits.late_groups == "wait" and not over_dispatched and self._lacking(version) > 0

    def late(self, version: WeightVersion) -> list[str]:
        """Groups in flight to abort after the step at `version`: no later step can train them."""
        if self._left <= 0 or self._limits.max_staleness == 0:
            return list(self._flying)
        return list(self._flying)[: self._excess(version + 1)] if self._limits.late_groups == "abort" else []

    @property
    def late_reason(self) -> str:
        """Reason for aborting the groups of `late`."""
        return "surplus" if self._left <= 0 or self._limits.max_staleness == 0 else "late"

    def close_surplus(self) -> None:
        """Close the groups that came back and have no step to train in."""
        if self._left <= 0 or self._limits.max_staleness == 0:
            self.close("surplus")

    def close(self, reason: str) -> None:
        """Close all groups that came back and were not taken."""
        for group_id, (deadline, scored) in list(self._ready.items()):
            del self._ready[group_id]
            self._alive[deadline] -= 1
            tokens = sum(sample.completion_tokens for sample in scored.group.samples)
            self._close_aborted(group_id, reason, tokens)

    def _lacking(self, version: WeightVersion) -> int:
        """Number of groups in flight that the step at `version` must wait for, so that later steps have room."""
        lacking, alive, ready = 0, 0, Counter(deadline for deadline, _ in self._ready.values())
        finished = 0
        for deadline in range(version, version + self._limits.max_staleness + 1):
            alive += self._alive[deadline]
            finished += ready[deadline]
            required = alive - (deadline - version) * self._limits.prompts_per_step
            lacking = max(lacking, required - finished)
        return lacking

    def _excess(self, version: WeightVersion) -> int:
        """Number of the oldest groups in flight that the takes from `version` on have no room for."""
        excess, alive = 0, 0
        for deadline in range(version - 1, version + self._limits.max_staleness + 1):
            alive += self._alive[deadline]
            excess = max(excess, alive - (deadline - version + 1) * self._limits.prompts_per_step)
        return min(excess, len(self._flying))

    def _drop_unusable(self, version: WeightVersion) -> None:
        """Close groups that masking leaves fewer than two samples of."""
        oldest = version - self._limits.max_staleness
        for group_id, (deadline, scored) in list(self._ready.items()):
            usable = [s for s, _ in scored.valued if s.tokens_before(oldest) < s.completion_tokens]
            if len(usable) < 2:
                del self._ready[group_id]
                self._alive[deadline] -= 1
                self._ledger.close(group_id, "stale", version - scored.group.first_version)

    def _figures(self) -> tuple[Arrivals, dict[str, float]]:
        arrived, self._arrived = self._arrived, Arrivals()
        count = self._aborted.total()
        metrics: dict[str, float] = {
            "dispatch/in_flight": len(self._flying),
            "dispatch/ready": len(self._ready),
            "dispatch/dispatched": self._dispatched,
            "dispatch/acceptance": self.acceptance,
            "dispatch/aborted": count,
            **{f"dispatch/aborted/{reason}": number for reason, number in sorted(self._aborted.items())},
        }
        if count:
            metrics["dispatch/aborted_tokens_mean"] = self._aborted_tokens / count
        self._aborted.clear()
        self._aborted_tokens = self._dispatched = 0
        return arrived, metrics
