"""Numbers as people write them, read exactly: `$1,234.50`, `\\frac{3}{4}`, `2 1/2`, `15\\%`, `3 \\times 10^5`, `5 mi`.

Nothing is evaluated: a text either is one plain number, perhaps with a currency, a percent sign or a unit, or it is not
a literal. `3 + 4`, `2^5` and `\\sqrt{9}` are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LITERAL_CHARS = 120
MAX_UNIT_WORDS = 4
RELATIVE_TOLERANCE = Fraction(1, 10**6)

MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
CONJUNCTIONS = ("and", "or", "to", "not", "but", "base")
ARITHMETIC = ("plus", "minus", "times", "divided", "over", "mod", "pi", "sqrt", "half", "dozen", "dozens")
NOT_UNITS = frozenset({*CONJUNCTIONS, *ARITHMETIC})

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_FRACTION = r"\\[dtc]?frac\s*(?:\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<bottom>-?\d+)\s*\}|(?P<top1>\d)\s*(?P<bottom1>\d))"
_POWER = r"(?:[eE](?P<e>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*\{?\s*(?P<ten>[+-]?\d{1,3})\s*\}?)"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)?\s*{_FRACTION}"
    rf"|(?P<mixed>\d+)\s+(?P<mtop>\d+)/(?P<mbottom>\d+)"
    rf"|(?P<number>{_UNSIGNED})(?:\s*/\s*(?P<divisor>{_UNSIGNED})|{_POWER})?)"
)
PERCENT = re.compile(r"\s*(?:\\?%|per\s?cent\b|percentage points?\b)", re.IGNORECASE)
DEGREES = re.compile(r"\s*(?:°|\^\s*\{?\s*\\circ\s*\}?)")
UNIT_WORD = re.compile(r"[^\W\d_]{2,}(?:\^\{?[23]\}?|[²³])?\.?")
ATTACHED_HANGUL = re.compile(r"(?=[가-힣])")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
SPACING = re.compile(r"\\left|\\right|\\!\s*|\\[,;: ]|~|\\quad")
ASSIGNMENT = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?\s*=\s*(?!=)")
CURRENCY = re.compile(r"\\?[$€£₩¥]")


@dataclass(frozen=True, slots=True)
class Literal:
    """A number, exactly. With `percent` the text had a percent sign and `value` is the written number / 100."""

    value: Fraction
    percent: bool = False


def parse_literal(text: str) -> Literal | None:
    """The number `text` is, or None when it is not one plain number."""
    if len(text) > MAX_LITERAL_CHARS:
        return None
    text = _plain(text)
    match = NUMBER.match(text)
    value = _value(match) if match else None
    if match is None or value is None:
        return None
    rest = text[match.end() :]
    percent = PERCENT.match(rest)
    if percent:
        rest, value = rest[percent.end() :], value / 100
    scale = _unit_scale(DEGREES.sub("", rest, count=1))
    return None if scale is None else Literal(value * scale, bool(percent))


def same_number(gold: Literal, given: Literal, percent_implied: bool = False) -> bool:
    """Whether `given` answers `gold`: equal, or within 1e-6 of it (relative) where the gold is not an integer.

    A percent sign may be missing when the gold has one, and be added when the question speaks of percent.
    """
    if _close(gold.value, given.value):
        return True
    if gold.percent and not given.percent:
        return _close(gold.value * 100, given.value)
    return percent_implied and given.percent and not gold.percent and _close(gold.value, given.value * 100)


def _close(gold: Fraction, given: Fraction) -> bool:
    if gold == given or gold.denominator == 1:
        return gold == given
    return abs(gold - given) <= abs(gold) * RELATIVE_TOLERANCE


def _plain(text: str) -> str:
    """`text` without what does not change the number: spacing commands, dollars, emphasis, `x =`, a final period."""
    text = text.replace("−", "-").replace("{,}", ",").replace("**", "").replace(r"\(", "").replace(r"\)", "")
    text = TEXT_COMMAND.sub(lambda match: _words(match.group(1)), text)
    text = CURRENCY.sub("", SPACING.sub("", text))
    return ASSIGNMENT.sub("", text).strip().rstrip(".").strip()


def _words(inside: str) -> str:
    """The inside of a \\text{...} as words; a unit of one letter (m, g) is spelt out, for outside it is a variable."""
    inside = inside.strip()
    return " unit" if len(inside) == 1 and inside.isalpha() else f" {inside}"


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of a NUMBER match; None where it divides by zero or a mixed number has a second sign."""
    part = match.groupdict()
    top, bottom = part["top"] or part["top1"] or part["mtop"], part["bottom"] or part["bottom1"] or part["mbottom"]
    divisor = _decimal(part["divisor"] or "1")
    if divisor == 0 or (bottom is not None and int(bottom) == 0):
        return None
    if part["whole"] and "-" in f"{top}{bottom}":
        return None
    value = _decimal(part["number"] or part["whole"] or part["mixed"] or "0") / divisor
    if bottom is not None:
        value += Fraction(int(top), int(bottom))
    value *= Fraction(10) ** int(part["e"] or part["ten"] or 0)
    return -value if part["sign"] == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")


def _unit_scale(rest: str) -> int | None:
    """1 for nothing or a unit, 10**6 for "million dollars"; None when `rest` is more than a unit."""
    if rest and not (rest[0].isspace() or rest[0] in "-/" or ATTACHED_HANGUL.match(rest) or UNIT_WORD.fullmatch(rest)):
        return None
    words = re.split(r"[\s/-]+", rest.strip(" -/\t\n"))
    words = [word for word in words if word]
    scale = MAGNITUDES.get(words[0].lower(), 1) if words else 1
    if len(words) > MAX_UNIT_WORDS or any(word.lower().rstrip(".") in NOT_UNITS for word in words):
        return None
    return scale if all(UNIT_WORD.fullmatch(word) for word in words) else None
