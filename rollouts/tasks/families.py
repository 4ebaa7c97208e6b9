"""What a family of procedural tasks is, the rule that splits its problems, and the registry.

A family at a difficulty is a finite space of parameter tuples; problem number `k` of it is decoded from `k` alone. A
hash of the problem's canonical form decides its split, whatever the seed, the difficulty or the order it is drawn in,
so no problem is ever in both splits. `47+38` and `38+47` have one canonical form.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.errors import ConfigError, did_you_mean

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 0.12


@dataclass(frozen=True, slots=True)
class Problem:
    """`question` as the policy sees it, `answer` a right one, `trace` short worked reasoning on one line.

    `canonical` names the problem up to changes that leave it the same problem (order of summands, of list entries).
    `hasty` is the answer of somebody in a hurry (forgets to carry; it may be right); empty where there is none.
    `metadata` is what the reward of the family reads besides the answer.
    """

    question: str
    answer: str
    trace: str
    canonical: str
    hasty: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskFamily:
    """`axes(difficulty)` are the values each parameter can take, `pose(*parameters)` states and solves one problem.

    `reward` names the registered reward that verifies an answer.
    """

    name: str
    axes: Callable[[int], tuple[Sequence[Any], ...]]
    pose: Callable[..., Problem]
    reward: str = "math"

    def size(self, difficulty: int) -> int:
        """Number of parameter tuples; some may state the same problem."""
        return math.prod(len(axis) for axis in self.axes(difficulty))

    def problem(self, difficulty: int, number: int) -> Problem:
        """Problem `0 <= number < size(difficulty)`."""
        parameters = []
        for axis in self.axes(difficulty):
            number, position = divmod(number, len(axis))
            parameters.append(axis[position])
        return self.pose(*parameters)

    def split_of(self, problem: Problem) -> Split:
        share = digest("split", self.name, problem.canonical) / 2**64
        return "held_out" if share < HELD_OUT_SHARE else "train"

    def draw(self, difficulty: int, split: Split, seed: int, index: int) -> Problem:
        """Draw number `index` of `seed`: uniform over the parameter tuples of the split, a pure function.

        The split must not be empty, see `distinct`.
        """
        size = self.size(difficulty)
        attempt = 0
        while True:
            problem = self.problem(difficulty, digest("draw", self.name, difficulty, seed, index, attempt) % size)
            if self.split_of(problem) == split:
                return problem
            attempt += 1

    def distinct(self, difficulty: int, split: Split, seed: int) -> Iterator[Problem]:
        """Every problem of the split exactly once, in an order that depends on the seed only.

        Taking all of them costs time in proportion to `size`; the first few are cheap.
        """
        size = self.size(difficulty)
        start, stride = digest("start", seed) % size, _coprime_stride(digest("stride", seed) % size, size)
        seen: set[str] = set()
        for step in range(size):
            problem = self.problem(difficulty, (start + step * stride) % size)
            if problem.canonical not in seen and self.split_of(problem) == split:
                seen.add(problem.canonical)
                yield problem


def digest(*parts: object) -> int:
    """64 bits that depend on the parts only: the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _coprime_stride(start: int, size: int) -> int:
    stride = max(1, start)
    while math.gcd(stride, size) != 1:
        stride += 1
    return stride


# --- registry ---------------------------------------------------------------------------------------------------------

_FAMILIES: dict[str, TaskFamily] = {}


def task_family(
    name: str, axes: Callable[[int], tuple[Sequence[Any], ...]], *, reward: str = "math"
) -> Callable[[Callable[..., Problem]], Callable[..., Problem]]:
    """Registers the decorated function as the family `name`, verified by `reward`; it gets one value of each axis."""

    def register(pose: Callable[..., Problem]) -> Callable[..., Problem]:
        if name in _FAMILIES:
            raise ValueError(f"task family {name!r} is registered twice")
        _FAMILIES[name] = TaskFamily(name, axes, pose, reward)
        return pose

    return register


def family_names() -> tuple[str, ...]:
    return tuple(_FAMILIES)


def get_family(name: str) -> TaskFamily:
    """Raises ConfigError with the nearest name for a family that is not registered."""
    if name not in _FAMILIES:
        rule = "must be registered task families"
        raise ConfigError([f"families = {name}: {rule}. There is no such family. {did_you_mean(name, _FAMILIES)}"])
    return _FAMILIES[name]
