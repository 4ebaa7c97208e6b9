"""The built-in reward `repetition`: a penalty for saying the same again and again."""

from __future__ import annotations

import re
from typing import Literal

from rewards.registry import RewardInput, Score, reward

_UNSPACED = (
    "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0eff"  # kana, Han, Thai, Lao: a sign is a word
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")


@reward("repetition", low=-1.0, high=0.0)
def repetition(
    sample: RewardInput, ngram: int = 20, free_share: float = 0.0, scope: Literal["completion", "final"] = "completion"
) -> Score:
    """Minus the share of n-grams that occurred before, in [-1, 0]: 1 - distinct / all n-grams of `ngram` words.

    Up to `free_share` costs nothing; from there it grows in a straight line to -1 at a share of 1. Signs are words,
    case does not matter; a text of fewer than `ngram` words has no n-grams and gets 0. The part `repeated_share` is
    the share itself. `scope`: the thinking too, or the final answer only. ValueError for impossible parameters.
    """
    _check(ngram, free_share, scope)
    words = _WORD.findall((sample.final if scope == "final" else sample.completion).casefold())
    count = len(words) - ngram + 1
    distinct = len({tuple(words[start : start + ngram]) for start in range(count)})
    share = 1 - distinct / count if count > 0 else 0.0
    value = -max(0.0, share - free_share) / (1 - free_share)
    return Score(value or 0.0, f"{share:.1%} of {max(count, 0)} {ngram}-grams are repeated", {"repeated_share": share})


def _check(ngram: int, free_share: float, scope: str) -> None:
    where = "Correct rewards.components.repetition.params"
    if ngram < 1:
        raise ValueError(f"ngram = {ngram}: must be at least 1. It counts words. {where}")
    if not 0 <= free_share < 1:
        raise ValueError(f"free_share = {free_share}: must be in [0, 1). The penalty starts above it. {where}")
    if scope not in ("completion", "final"):
        raise ValueError(f"scope = {scope!r}: must be completion or final. {where}")
