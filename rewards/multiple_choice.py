"""The built-in reward `multiple_choice`: 1.0 when the final answer names the right option and no other."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping
from typing import Any

from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError

_PHRASE = re.compile(
    r"(?:answer|option|choice)\s*(?:is|:|=)|정답은|정답\s*:|답은|답\s*:|respuesta(?:\s+correcta)?\s*(?:es|:)",
    re.IGNORECASE,
)
_SEGMENT_END = re.compile(
    r"\.(?=\s|$)|[!?。\n;]|\b(?:because|since|as|rather than|instead of|not|porque)\b", re.IGNORECASE
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


@reward("multiple_choice")
def multiple_choice(sample: RewardInput) -> Score:
    """1.0 or 0.0 with the letters found as the reason.

    `metadata.options` is a list of texts (A, B, ... in their order) or an object from letter to text; the record's
    answer is a letter or one option's text. Every box counts, else every "answer is", else the last line; two
    different letters in them are wrong whatever they are. Without a letter the text of exactly one option will do.
    Raises DataError for a record without options or with another answer.
    """
    options = options_of(sample.metadata)
    gold = _gold(sample.answer, options)
    found = chosen(sample.final, options)
    if len(found) != 1:
        return Score(0.0, f"{len(found)} options named: {', '.join(sorted(found))}" if found else "no option named")
    return Score(float(found == {gold}), f"{'right' if found == {gold} else 'wrong'}: {found.pop()}")


def options_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> text. Raises DataError when `metadata.options` has not two options or more."""
    options = metadata.get("options")
    if isinstance(options, list | tuple) and 2 <= len(options) <= len(string.ascii_uppercase):
        return {letter: str(text) for letter, text in zip(string.ascii_uppercase, options, strict=False)}
    if isinstance(options, Mapping):
        given = {str(letter).strip().upper(): str(text) for letter, text in options.items() if text is not None}
        if len(given) >= 2 and all(re.fullmatch("[A-Z]", letter) for letter in given):
            return given
    raise DataError(
        f"metadata.options = {options!r}: must be a list of 2 to 26 texts or an object from letter to text. "
        "multiple_choice needs to know what can be chosen. Fix the record or name the metadata column options."
    )


def chosen(final: str, options: Mapping[str, str]) -> set[str]:
    """The letters of the options that `final` names where it states its answer."""
    segments = _segments(unicodedata.normalize("NFKC", final).replace("**", ""))
    letters = {letter for segment in segments for letter in _letters(segment, options)}
    if letters:
        return letters
    return {letter for segment in segments for letter, text in options.items() if _plain(segment) == _plain(text) != ""}


def _gold(answer: str, options: Mapping[str, str]) -> str:
    letter = answer.strip().strip("().").upper()
    if letter in options:
        return letter
    same = [letter for letter, text in options.items() if _plain(text) == _plain(answer) != ""]
    if len(same) != 1:
        known = ", ".join(options)
        raise DataError(f"answer = {answer!r}: must be one of {known} or one option's text. Fix or drop the record.")
    return same[0]


def _segments(final: str) -> list[str]:
    """Where the answer is stated: the boxes, else what follows each "answer is", else the last line."""
    boxes = [_TEXT_COMMAND.sub(r"\1", box) for box in _BOX.findall(final)]
    if boxes:
        return boxes
    tails = [final[phrase.end() :].lstrip(" \n:*") for phrase in _PHRASE.finditer(final)]
    if tails:
        ends = [_SEGMENT_END.search(tail, 1) for tail in tails]
        return [tail[: end.start()] if end else tail for tail, end in zip(tails, ends, strict=True)]
    lines = [line.strip() for line in final.splitlines() if line.strip()]
    return lines[-1:]


def _letters(segment: str, options: Mapping[str, str]) -> set[str]:
    """Capital letters that stand alone, and any letter in parentheses or that is all there is.

    "A" before a word in lower case is an article; "I" is a pronoun unless something sets it apart.
    """
    bare = segment.strip().strip("().: ").upper()
    if bare in options:
        return {bare}
    enclosed = {letter.upper() for letter in re.findall(r"\(([A-Za-z])\)", segment)}
    alone = set(
        re.findall(r"(?<![\w'’(-])(?!A (?!or\b|and\b)[a-z]|I (?!or\b|and\b)[a-z]|I['’])([A-Z])(?![\w'’-])", segment)
    )
    alone |= set(re.findall(r"(?<![A-Za-z(])([A-Z])(?=[가-힣])", segment))  # a particle follows: B입니다
    return (enclosed | alone) & options.keys()


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().strip().strip(".\"'").split())
