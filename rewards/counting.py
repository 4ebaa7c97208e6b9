"""The built-in reward `counting`: 1.0 for exactly the right number of things."""

from __future__ import annotations

import re

from rewards.answers import after_phrase, last_boxed
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_VALUES = {word: value for value, word in enumerate(_WORDS.split(" "))} | {"none": 0}
_NUMBER = re.compile(rf"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\b(?:{'|'.join(_VALUES)})\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[!?。\n]")


@reward("counting")
def counting(sample: RewardInput) -> Score:
    """1.0 or 0.0 with the numbers found as the reason.

    The answer is in the last box, else after the last "answer is", else in the last sentence with a number, in digits
    or English words up to twenty. Two different numbers there are wrong: "5 or 6" is no count. Raises DataError when
    the record's answer is not a whole number of 0 or more.
    """
    if not re.fullmatch(r"\s*\d+\s*", sample.answer):
        raise DataError(
            f"answer = {sample.answer!r}: must be a whole number of 0 or more. It is a count. Fix the record."
        )
    found = {_value(text) for text in _NUMBER.findall(_segment(sample.final))}
    if len(found) != 1:
        return Score(0.0, f"{len(found)} different numbers in the answer" if found else "no number in the answer")
    given = found.pop()
    return Score(float(given == int(sample.answer)), f"{given:g} counted")


def _segment(final: str) -> str:
    stated = last_boxed(final) or after_phrase(final)
    if stated is not None:
        return stated
    sentences = [sentence for sentence in _SENTENCE_END.split(final) if _NUMBER.search(sentence)]
    return sentences[-1] if sentences else ""


def _value(text: str) -> float:
    word = _VALUES.get(text.casefold())
    return float(text.replace(",", "")) if word is None else float(word)
