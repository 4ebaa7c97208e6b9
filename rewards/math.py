"""The built-in reward `math`: 1.0 when the final answer equals the reference answer.

The answer is the last balanced `\\boxed{...}` of the final text, else what follows "the answer is" or "####", else the
last number. A numeric reference needs a number as answer, compared exactly; anything else is equal when its normalised
text is equal or math-verify says so. math-verify has no time limit here: the grader process is killed at the deadline.
Only its LaTeX extraction is used, since its plain-expression one would evaluate the model's text.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Literal

from rewards.answers import after_phrase, last_boxed, last_number
from rewards.literals import (
    TEXT_COMMAND,
    conclude,
    known_units,
    other_units,
    parse_literal,
    same_number,
    spelt_out,
)
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError

Extraction = Literal["boxed_or_last_number", "boxed"]

MAX_ANSWER_CHARS = 1000  # longer is no answer but a text, and slow to parse
RELATIVE_TOLERANCE = 1e-6
PERCENT_WORDS = re.compile(r"%|per ?cent|por ?ciento|porcentaje|퍼센트|백분율", re.IGNORECASE)
UNEVALUATED = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|binom|dbinom|det)(?![A-Za-z])|!")


@reward("math")
def math(sample: RewardInput, extraction: Extraction = "boxed_or_last_number") -> Score:
    """1.0 or 0.0 with what was compared as the reason.

    `extraction: boxed` accepts boxed answers only, as do truncated samples: their last number may be half of one.
    Raises DataError when the reference answer is empty or malformed.
    """
    if extraction not in ("boxed_or_last_number", "boxed"):
        raise ValueError(f"extraction = {extraction!r}: must be boxed_or_last_number or boxed")
    gold = reference(sample.answer)
    if not sample.final.strip():
        return Score(0.0, "no final answer")
    numeric = parse_literal(gold) is not None
    candidate = extract(sample.final, numeric, boxed_only=extraction == "boxed" or sample.truncated)
    if candidate is None:
        return Score(0.0, "no answer found in the final text")
    correct, rule = judge(gold, candidate, question=_question(sample))
    return Score(float(correct), f"{'right' if correct else 'wrong'} ({rule}): {candidate[:80]}")


def reference(answer: str) -> str:
    """The reference answer, out of its box if it has one. Raises DataError when it cannot be an answer."""
    gold = (last_boxed(answer) or answer).strip()
    if not normalise(gold):
        raise DataError(f"answer = {answer!r}: must not be empty. Nothing could be right. Fix or drop the record.")
    if "####" in gold:
        fix = r"Set answer_pattern, for example '#### (.+)'."
        raise DataError(f"answer = {answer[-80:]!r}: must be the answer alone. It has a worked solution. {fix}")
    if not _balanced(gold):
        raise DataError(f"answer = {answer!r}: braces must balance. It cannot be parsed. Fix or drop the record.")
    if re.fullmatch(r"[+-]?[\d.,\s]*/\s*0+", gold):
        raise DataError(f"answer = {answer!r}: must be a number. It divides by zero. Fix or drop the record.")
    return gold


def extract(final: str, numeric: bool, boxed_only: bool = False) -> str | None:
    """The answer in `final`, or None. `numeric`: of "answer is 3 times 6 = 18" the last number is the answer."""
    boxed = last_boxed(final)
    if boxed is not None or boxed_only:
        return boxed or None
    tail = after_phrase(final)
    if tail is None:
        return last_number(final)
    return tail if not numeric or parse_literal(tail) else last_number(tail)


def judge(gold: str, candidate: str, question: str = "") -> tuple[bool, str]:
    """(correct, the rule that decided)."""
    number = parse_literal(gold)
    if number is None:
        return _judge_expression(gold, candidate)
    given = parse_literal(candidate) or conclude(candidate)
    if given is None:
        return False, "not a number"
    return same_number(number, given, bool(PERCENT_WORDS.search(question))), "number"


def _judge_expression(gold: str, candidate: str) -> tuple[bool, str]:
    gold, candidate = _as_latex(gold), _as_latex(candidate)
    if normalise(gold) == normalise(candidate):
        return True, "same text"
    if ("=" in gold) != ("=" in candidate):
        gold, candidate = _LABEL.sub("", gold), _LABEL.sub("", candidate)
    if len(candidate) > MAX_ANSWER_CHARS:
        return False, "too long"
    if _is_text(gold):
        return False, "other words"
    if (digits := _numeral(gold)) and (given := _numeral(candidate)):
        return digits == given, "digits"
    if objection := _objection(gold, candidate):
        return False, objection
    return _symbolically_equal(gold, candidate), "math-verify"


def _objection(gold: str, candidate: str) -> str:
    """Why they differ though math-verify may take them for the same; "" where nothing of that kind is seen."""
    if _delimiters(gold) and _delimiters(candidate) and _delimiters(gold) != _delimiters(candidate):
        return "other brackets"
    if set(UNEVALUATED.findall(candidate)) - set(UNEVALUATED.findall(gold)):
        return "not worked out"
    if other_units(_units(gold), _units(candidate)):
        return "other units"
    return ""


# --- equality of text -------------------------------------------------------------------------------------------------

_REMOVED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\quad|\\displaystyle|~|\$|\\\(|\\\)|\^\{?\\circ\}?|°"
)
_RENAMED = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:le|leqslant)(?![a-zA-Z])"), r"\\leq"),
    (re.compile(r"\\(?:ge|geqslant)(?![a-zA-Z])"), r"\\geq"),
    (re.compile(r"\\ne(?![a-zA-Z])"), r"\\neq"),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])|\\ast|\*"), r"\\cdot "),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"[bp]matrix|array\}\{[clr|]*"), "matrix"),
    (re.compile(r"\\sqrt\s*(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(?<![\w}.])(\d+)/(\d+)(?![\w{.])"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<!\d)\.(\d)"), r"0.\1"),
    (re.compile(r"\\[lcd]dots|\\dots|\.\.\."), r"\\ldots"),
    (re.compile(r"_\{(\w)\}"), r"_\1"),
    (re.compile(r"(^|[(\[,])\s*\+"), r"\1"),
)
_SIGNS = str.maketrans(
    {"−": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq "}
    | {"≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "²": "^{2}", "³": "^{3}"}
)
_SET_BUILDER = re.compile(
    r"(?:\\left)?\\\{\s*[a-z]\s*(?:\\mid|\\vert|\||:)\s*((?:(?!\\in(?![a-z])).)*(?:[<>]|\\[lg]eq?|\\neq?)(?:(?!\\in(?![a-z])).)*?)"
    r"(?:\\right)?\\\}"
)
_ASSIGNED = re.compile(r"([A-Za-z])\s*=\s*([^=]+)")
_SEPARATOR = re.compile(r",|\\text\s*\{\s*(?:,\s*)?and\s*\}|\band\b")
_NUMERAL = re.compile(r"\d[\dA-F]*_\w+|\d[\d.]*(?::\d[\d.]*)+")
_NAMED = r"[A-Za-z](?:'|\^\{-1\})*(?:\([a-z]\))?|\\frac\s*\{d[a-z]\}\s*\{d[a-z]\}"
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "sixteen": 16}
_LABEL = re.compile(rf"^\s*(?:{_NAMED})\s*(?:=|\\in(?![a-z]))\s*(?!=)")
_CHOICE = re.compile(r"\(([A-Z])\)")
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\w{2})", re.IGNORECASE)
_SYNONYMS = dict.fromkeys(("nosolution", "nosolutions", "emptyset"), r"\emptyset") | {"dne": "doesnotexist"}
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ -][^\W\d_]+)*")


def normalise(text: str) -> str:
    """`text` with spellings that mean the same made the same: spacing, \\text, fractions, relations, `x =`."""
    text = _REMOVED.sub("", text.replace("−", "-"))
    text = TEXT_COMMAND.sub(r"\1", text).strip().rstrip(".").strip()
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    text = _LABEL.sub("", text.strip())
    if _WORDS.fullmatch(_ARTICLE.sub("", text, count=1)):
        text = _ARTICLE.sub("", text, count=1).casefold()
    choice = _CHOICE.fullmatch(text)
    text = choice.group(1) if choice else re.sub(r"\s+", "", text)
    return _SYNONYMS.get(text, text)


def _delimiters(text: str) -> str:
    """What encloses a list: "()", "[)", "{}" and so on, "{}" also for a bare list; "" for what is no list."""
    text = re.sub(r"\s", "", _LABEL.sub("", _REMOVED.sub("", text).strip())).replace(r"\{", "⟨").replace(r"\}", "⟩")
    commas = _comma_depths(text)
    if 0 in commas:
        return "{}"
    if 1 in commas and text[:1] in "([⟨" and text[-1:] in ")]⟩" and _encloses(text):
        return {"⟨": "{"}.get(text[0], text[0]) + {"⟩": "}"}.get(text[-1], text[-1])
    return ""


def _is_text(gold: str) -> bool:
    """Whether the gold is words: as a formula they would be a product of letters, equal in any order."""
    if TEXT_COMMAND.fullmatch(gold.strip()):
        return True
    return bool(_WORDS.fullmatch(gold.strip())) and any(len(word) >= 5 for word in gold.split())


def _as_latex(text: str) -> str:
    """`text` with mathematical characters as the LaTeX commands they stand for."""
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda root: rf"\sqrt{{{root.group(1) or root.group(2)}}}", text)
    text = text.translate(_SIGNS)
    text = re.sub(r"\\langle(?![A-Za-z])", "(", re.sub(r"\\rangle(?![A-Za-z])", ")", text))
    builder = _SET_BUILDER.fullmatch(text.strip())
    return _assigned(builder.group(1) if builder else text)


def _assigned(text: str) -> str:
    """`y=4, x=1` as the tuple (1,4), in the order of the names; any other text as it is."""
    parts = [_ASSIGNED.fullmatch(part.strip()) for part in _SEPARATOR.split(_REMOVED.sub("", text))]
    values = {part.group(1): part.group(2) for part in parts if part}
    return f"({','.join(values[name] for name in sorted(values))})" if len(values) == len(parts) > 1 else text


def _numeral(text: str) -> str:
    """Digits to a base (43_5) or in a ratio (1:2:3): math-verify drops subscripts and misreads ratios. "" else."""
    bare = re.sub(r"[{}()]", "", normalise(text))
    digits, _, base = bare.partition("_")
    bare = f"{digits}_{_BASES.get(base, base)}" if base else bare
    return bare if _NUMERAL.fullmatch(bare) else ""


def _units(text: str) -> frozenset[str]:
    """The known units that stand in \\text{...}."""
    return known_units(spelt_out(match.group(1)) for match in TEXT_COMMAND.finditer(text))


def _comma_depths(text: str) -> set[int]:
    depth, depths = 0, set()
    for character in text:
        depth += (character in "([⟨{") - (character in ")]⟩}")
        if character == ",":
            depths.add(depth)
    return depths


def _encloses(text: str) -> bool:
    """Whether the first bracket closes with the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([⟨{") - (character in ")]⟩}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _balanced(text: str) -> bool:
    depth = 0
    for token in re.findall(r"\\\\|\\[{}]|[{}]", text):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0


def _question(sample: RewardInput) -> str:
    return sample.messages[-1].get("content", "") if sample.messages else ""


# --- symbolic equality ------------------------------------------------------------------------------------------------

_NO_VARIABLE = r"\\(?:math\w+|text\w*|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+"
_VARIABLE = re.compile(rf"{_NO_VARIABLE}|([A-Za-z])(?:_\{{(\w+)\}}|_(\w))?")


def _symbolically_equal(gold: str, candidate: str) -> bool:
    """math-verify's verdict, and for numbers also a relative gap below 1e-6: its own tolerance is absolute.

    Raises DataError when the gold cannot be parsed at all; may run for ever or out of memory on hostile candidates.
    """
    from math_verify import verify

    clashing = _letters_in_both_cases(gold + " " + candidate)
    golds, candidates = _parse(_capitals_marked(gold, clashing)), _parse(_capitals_marked(candidate, clashing))
    if not golds:
        raise DataError(f"answer = {gold!r}: must be an expression or a text. math-verify finds nothing in it.")
    if not verify(golds, candidates, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return _relatively_close(golds[0], candidates[0])


def _parse(text: str) -> list[Any]:
    """math-verify's reading of one LaTeX answer: an expression, then its text. Boxed: bare LaTeX is often missed."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off; ours is outside
    return list(parse(rf"\boxed{{{text}}}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None))


def _letters_in_both_cases(text: str) -> frozenset[str]:
    """The capital letters of variables that also occur as small ones."""
    letters = {match.group(1) for match in _VARIABLE.finditer(text) if match.group(1)}
    return frozenset(letter for letter in letters if letter.isupper() and letter.lower() in letters)


def _capitals_marked(text: str, letters: frozenset[str]) -> str:
    """`text` with a subscript at those capitals: math-verify would take R and r for the same."""

    def marked(match: re.Match[str]) -> str:
        letter, subscript = match.group(1), match.group(2) or match.group(3) or ""
        return f"{letter}_{{{subscript}99}}" if letter in letters else match.group()

    return _VARIABLE.sub(marked, text)


def _relatively_close(gold: Any, candidate: Any) -> bool:
    from sympy import N

    if not (getattr(gold, "is_number", False) and getattr(candidate, "is_number", False)) or gold == 0:
        return True
    return float(abs(N(candidate / gold, 15) - 1)) <= RELATIVE_TOLERANCE
