"""The built-in reward `chart_relaxed`: ChartQA's relaxed accuracy, exact where a tolerance would be absurd."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from rewards.answers import after_phrase, last_boxed, last_number
from rewards.literals import Literal, parse_literal
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError

TYPES = ("number", "integer", "year", "text")
_YEAR = re.compile(r"1[5-9]\d\d|20\d\d")
_SEVERAL = re.compile(r"\d\s*(?:or|to|and|-|–|~|또는)\s*\d", re.IGNORECASE)


@reward("chart_relaxed")
def chart_relaxed(sample: RewardInput, tolerance: float = 0.05) -> Score:
    """1.0 when a number is within `tolerance` of the reference, relatively; texts must be equal but for case.

    `metadata.answer_type`: `number` has the tolerance; `integer` and `year` are exact; `text` is compared as text.
    Without it a reference that looks like a year (1500 to 2099) is one, another number is a number, the rest is text.
    A reference of 0 is exact, as is every sign. Two numbers are no answer. Raises DataError for an empty reference or
    an unknown type, ValueError unless 0 <= tolerance < 1.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance = {tolerance}: must be in [0, 1). It is relative. Correct the params of chart_relaxed"
        )
    kind, gold = _type(sample), parse_literal(sample.answer)
    candidate = _candidate(sample.final, numeric=kind != "text")
    if not candidate:
        return Score(0.0, "no answer in the final text")
    if kind == "text" or gold is None:
        right = _plain(candidate) == _plain(sample.answer)
    else:
        given = None if _SEVERAL.search(candidate) else parse_literal(candidate)
        allowed = Fraction(tolerance) if kind == "number" else Fraction(0)
        right = given is not None and _near(gold, given, allowed)
    return Score(float(right), f"{'right' if right else 'wrong'} ({kind}): {candidate[:80]}")


def _type(sample: RewardInput) -> str:
    kind = sample.metadata.get("answer_type")
    numeric = parse_literal(sample.answer) is not None
    if not sample.answer.strip():
        raise DataError("answer is empty: must be a number or a text. Nothing could be right. Fix or drop the record.")
    if kind is None:
        return "year" if _YEAR.fullmatch(sample.answer.strip()) else "number" if numeric else "text"
    if kind not in TYPES or (kind != "text" and not numeric):
        raise DataError(
            f"metadata.answer_type = {kind!r} with answer = {sample.answer!r}: must be one of {', '.join(TYPES)} and "
            "fit the answer. It says how exact the answer must be. Fix the record."
        )
    return str(kind)


def _candidate(final: str, numeric: bool) -> str:
    found = last_boxed(final) or after_phrase(final)
    if found is None:
        lines = [line for line in final.splitlines() if line.strip()]
        found = lines[-1] if lines else ""
    if not numeric or parse_literal(found) or _SEVERAL.search(found):
        return found.strip()
    return last_number(found) or ""


def _near(gold: Literal, given: Literal, tolerance: Fraction) -> bool:
    """Within the tolerance; a percent sign may be missing on either side."""
    values = [given.value]
    if gold.percent != given.percent:
        values.append(given.value / 100 if gold.percent else given.value * 100)
    return any(abs(value - gold.value) <= abs(gold.value) * tolerance for value in values)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("**", "").strip(" .\"'").split())
