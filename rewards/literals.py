"""Numbers as people write them, read exactly: `$1,234.50`, `\\frac{3}{4}`, `2 1/2`, `15\\%`, `3 \\times 10^5`, `5 mi`.

Nothing is evaluated: a text either is one plain number, perhaps with a label before it (`x =`, `f(3) =`) and a
currency, a percent sign or a unit, or it is not a literal. `3 + 4`, `2^5` and `\\sqrt{9}` are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

MAX_LITERAL_CHARS = 120
MAX_UNIT_WORDS = 4
RELATIVE_TOLERANCE = Fraction(1, 10**6)

MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
CONJUNCTIONS = ("and", "or", "to", "not", "but", "base")
ARITHMETIC = ("plus", "minus", "times", "divided", "over", "mod", "pi", "sqrt", "half", "dozen", "dozens")
CLAIMS = ("is", "are", "was", "were", "wrong", "incorrect", "false")
NOT_UNITS = frozenset({*CONJUNCTIONS, *ARITHMETIC, *CLAIMS})

# The spellings of one unit in a line, without the plural s. Two of different lines are never the same amount.
_SPELLINGS = """
millimeter millimetre mm
centimeter centimetre cm
meter metre
kilometer kilometre km
inch inches in
foot feet ft
yard yd
mile mi
milligram mg
gram gm
kilogram kg kilo
pound lb
ounce oz
ton tonne
milliliter millilitre ml
liter litre
gallon gal
second sec
minute min
hour hr
day
week
month
year yr
cent penny pennies
dollar usd
euro
degree
radian rad
"""
UNITS = {word: line.split()[0] for line in _SPELLINGS.strip().splitlines() for word in line.split()}
COMPOUND_UNITS = {"mph": ("mile", "hour"), "kph": ("kilometer", "hour"), "kmh": ("kilometer", "hour")}
LETTER_UNITS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "l": "liter", "L": "liter"}
VARIABLES = frozenset("eijknxyz")  # letters that are no unit even in \text{...}

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_FRACTION = r"\\[dtc]?frac\s*(?:\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<bottom>-?\d+)\s*\}|(?P<top1>\d)\s*(?P<bottom1>\d))"
_POWER = r"(?:[eE](?P<e>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*\{?\s*(?P<ten>[+-]?\d{1,3})\s*\}?)"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)?\s*{_FRACTION}"
    rf"|(?P<mixed>\d+)\s+(?P<mtop>\d+)/(?P<mbottom>\d+)"
    r"|(?P<fixed>\d*\.\d*)\\(?:overline|bar)\s*\{(?P<repeated>\d{1,18})\}"
    r"|10\s*\^\s*\{?\s*(?P<power>[+-]?\d{1,3})\s*\}?(?![\d.])"
    rf"|(?P<number>{_UNSIGNED})(?:\s*/\s*(?P<divisor>{_UNSIGNED})|{_POWER})?)"
)
PERCENT = re.compile(r"\s*(?:\\?%|per\s?cent\b|percentage points?\b)", re.IGNORECASE)
DEGREES = re.compile(r"\s*(?:°|\^\s*\{?\s*\\circ\s*\}?)")
SINGLE_LETTER = re.compile(r"(?<![^\W\d_])[A-Za-z](?![^\W\d_])")
UNIT_WORD = re.compile(r"[^\W\d_]{2,}(?:\^\{?[23]\}?|[²³])?\.?")
ATTACHED_HANGUL = re.compile(r"(?=[가-힣])")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
SPACING = re.compile(r"\\left|\\right|\\!\s*|\\[,;: ]|~|\\quad")
_FUNCTION = r"[A-Za-z](?:_\{?\w+\}?)?(?:\([\w, ]{1,12}\))?"
_FIGURE = r"m?\\angle\s*[A-Z]{1,3}|\|?[A-Z]{2}\|?|\\overline\s*\{[A-Z]{2}\}"
ASSIGNMENT = re.compile(rf"^\s*(?:{_FUNCTION}|{_FIGURE})\s*(?:=|\\approx)\s*(?!=)")
BASE_TEN = re.compile(r"(?<=\d)_(?:\{\s*(?:10|ten)\s*\}|10(?!\d))")
CURRENCY = re.compile(r"\\?[$€£₩¥]")
WITHOUT_VARIABLES = re.compile(
    r"(?:[\d\s+\-*/^().,{}×·÷!%]|\\(?:[dtc]?frac|times|cdot|div|sqrt|binom|left|right)(?![A-Za-z]))+"
)


@dataclass(frozen=True, slots=True)
class Literal:
    """A number, exactly. With `percent` the text had a percent sign and `value` is the written number / 100.

    `units`: those of its units that are known, "60 mph" has mile and hour.
    """

    value: Fraction
    percent: bool = False
    units: frozenset[str] = frozenset()


def parse_literal(text: str) -> Literal | None:
    """The number `text` is, or None when it is not one plain number."""
    if len(text) > MAX_LITERAL_CHARS:
        return None
    written, text = text, _plain(text)
    match = NUMBER.match(text)
    value = _value(match) if match else None
    if match is None or value is None:
        return None
    rest = text[match.end() :]
    percent = PERCENT.match(rest)
    if percent:
        rest, value = rest[percent.end() :], value / 100
    units = known_units([DEGREES.sub(" degrees", rest), "dollars" if r"\$" in written else ""])
    scale = _unit_scale(DEGREES.sub("", rest, count=1))
    return None if scale is None else Literal(value * scale, bool(percent), units)


def conclude(text: str) -> Literal | None:
    """The number at the end of an equation of numbers, `P = \\frac{3}{12} = \\frac{1}{4}`; None for anything else.

    An equation with a variable (`x^2 = 5`) concludes nothing, and neither does one between different numbers.
    """
    if len(text) > MAX_LITERAL_CHARS:
        return None
    *before, last = _plain(text).split("=")
    result = parse_literal(last)
    if result is None or not all(WITHOUT_VARIABLES.fullmatch(side) for side in before):
        return None
    stated = [number for side in before if (number := parse_literal(side))]
    return result if all(_close(number.value, result.value) for number in stated) else None


def same_number(gold: Literal, given: Literal, percent_implied: bool = False) -> bool:
    """Whether `given` answers `gold`: equal, or within 1e-6 of it (relative) where the gold is not an integer.

    A percent sign may be missing when the gold has one, and be added when the question speaks of percent. A unit may
    be missing or added, but not be another one.
    """
    if other_units(gold.units, given.units):
        return False
    if _close(gold.value, given.value):
        return True
    if gold.percent and not given.percent:
        return _close(gold.value * 100, given.value)
    return percent_implied and given.percent and not gold.percent and _close(gold.value, given.value * 100)


def known_units(texts: Iterable[str]) -> frozenset[str]:
    """The units among the words of `texts`, in one spelling."""
    words = [word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text)]
    found = {UNITS.get(word) or UNITS.get(word.removesuffix("s")) for word in words}
    return frozenset(
        {unit for unit in found if unit} | {unit for word in words for unit in COMPOUND_UNITS.get(word, ())}
    )


def other_units(gold: frozenset[str], given: frozenset[str]) -> bool:
    """Whether `given` contradicts `gold`: neither has all units of the other."""
    return not (gold <= given or given <= gold)


def _close(gold: Fraction, given: Fraction) -> bool:
    if gold == given or gold.denominator == 1:
        return gold == given
    return abs(gold - given) <= abs(gold) * RELATIVE_TOLERANCE


def _plain(text: str) -> str:
    """`text` without what does not change the number: spacing commands, dollars, emphasis, `x =`, a final period."""
    text = text.replace("−", "-").replace("{,}", ",").replace("**", "").replace(r"\(", "").replace(r"\)", "")
    text = TEXT_COMMAND.sub(lambda match: spelt_out(match.group(1)), text)
    text = BASE_TEN.sub("", text)
    text = CURRENCY.sub("", SPACING.sub("", text))
    return ASSIGNMENT.sub("", text).strip().rstrip(".").strip()


def spelt_out(inside: str) -> str:
    """The inside of a \\text{...} as words; a unit of one letter (m, g) is spelt out, for outside it is a variable."""
    return " " + SINGLE_LETTER.sub(lambda match: _letter(match.group()), inside.strip())


def _letter(letter: str) -> str:
    return letter if letter in VARIABLES else LETTER_UNITS.get(letter, "unit")


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of a NUMBER match; None where it divides by zero or a mixed number has a second sign."""
    part = match.groupdict()
    value = _magnitude(part)
    return -value if value is not None and part["sign"] == "-" else value


def _magnitude(part: dict[str, str | None]) -> Fraction | None:
    if part["repeated"] is not None:
        return _repeating(part["fixed"] or "", part["repeated"])
    if part["power"] is not None:
        return Fraction(10) ** int(part["power"])
    top, bottom = part["top"] or part["top1"] or part["mtop"], part["bottom"] or part["bottom1"] or part["mbottom"]
    divisor = _decimal(part["divisor"] or "1")
    if divisor == 0 or (bottom is not None and int(bottom) == 0):
        return None
    if part["whole"] and "-" in f"{top}{bottom}":
        return None
    value = _decimal(part["number"] or part["whole"] or part["mixed"] or "0") / divisor
    if bottom is not None:
        value += Fraction(int(top or "0"), int(bottom))
    return value * Fraction(10) ** int(part["e"] or part["ten"] or 0)


def _repeating(fixed: str, repeated: str) -> Fraction:
    """0.1 and 6 as 1/6."""
    unit = Fraction(10) ** -len(fixed.partition(".")[2])
    return _decimal(fixed if fixed != "." else "0") + unit * Fraction(int(repeated), 10 ** len(repeated) - 1)


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
