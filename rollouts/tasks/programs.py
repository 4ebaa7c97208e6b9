"""Tiny programs: a formula in words, answered by a Python function in a code block, verified by `code`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollouts.tasks.families import Problem, task_family

_SIGNS = {"plus": "+", "minus": "-"}
_INPUTS = ((0, 0), (1, 0), (0, 1), (7, 3))  # the first three tell any two linear formulas apart


def _axes(difficulty: int) -> tuple[Sequence[Any], ...]:
    return ("a", "b"), range(2, 10), tuple(_SIGNS), tuple(_SIGNS), range(1, 10**difficulty)


@task_family("program", _axes, reward="code")
def _program(scaled: str, factor: int, sign: str, last_sign: str, constant: int) -> Problem:
    """`f(a,b): 3 times a plus b minus 47`; the hasty program leaves the last term out, and is always wrong."""
    other = "b" if scaled == "a" else "a"
    words = f"{factor} times {scaled} {sign} {other} {last_sign} {constant}"
    short = f"{scaled}*{factor}{_SIGNS[sign]}{other}"
    formula = f"{short}{_SIGNS[last_sign]}{constant}"
    slopes = {scaled: factor, other: 1 if sign == "plus" else -1}
    offset = constant if last_sign == "plus" else -constant
    tests = [{"call": "f", "args": [a, b], "expected": slopes["a"] * a + slopes["b"] * b + offset} for a, b in _INPUTS]
    question = f"f(a,b): {words}"
    return Problem(question, _block(formula), formula, words, _block(short), {"tests": tests})


def _block(formula: str) -> str:
    return f"```\ndef f(a,b):\n return {formula}\n```"
