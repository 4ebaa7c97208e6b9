"""The built-in reward `language_consistency`: is the answer in the language it was asked in?

Languages are told apart by their script, which costs nothing and cannot be unsure: Korean, Japanese, Chinese, Russian
and the like, but not English from French.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from typing import Literal

from rewards.registry import Abstain, RewardInput, Score, reward

_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)"  # code blocks, also one that is never closed
    r"|`[^`\n]*`"
    r"|https?://\S+"
    r"|</?think>"
    r"|\\[A-Za-z]+"  # LaTeX commands: \frac, \begin
    r"|\[?\|[a-z_]+\|\]?",  # turn markers of chat templates
    re.DOTALL,
)

_HAN, _KANA = "CJK", ("HIRAGANA", "KATAKANA")
_CYRILLIC = ("CYRILLIC",)

LANGUAGES: dict[str, tuple[str, ...]] = {
    "arabic": ("ARABIC",),
    "chinese": (_HAN,),
    "english": ("LATIN",),
    "greek": ("GREEK",),
    "hebrew": ("HEBREW",),
    "hindi": ("DEVANAGARI",),
    "japanese": (*_KANA, _HAN),
    "korean": ("HANGUL",),
    "russian": _CYRILLIC,
    "thai": ("THAI",),
    "ukrainian": _CYRILLIC,
} | dict.fromkeys(("french", "german", "italian", "portuguese", "spanish", "vietnamese"), ("LATIN",))
"""Language -> the scripts it is written in, as the names of Unicode characters begin."""

_FORMS = ("FULLWIDTH", "HALFWIDTH")
_BORROWED = {"MATHEMATICAL", "MICRO", "MODIFIER", "DOUBLE", "SCRIPT", "BLACK", "SUPERSCRIPT", "SUBSCRIPT", "PLANCK"}
_SIGN_SCRIPTS = {"LATIN", "GREEK"}  # a single letter of these is a variable or a sign: x, n, α


@reward("language_consistency")
def language_consistency(
    sample: RewardInput,
    scope: Literal["final", "completion"] = "final",
    language: str | None = None,
    without_letters: float | None = None,
) -> Score | Abstain:
    """The share of letters that are in the expected script, in [0, 1].

    `scope`: the text after the thinking, or all of it. `language`: a name of `LANGUAGES`; None is that of the last user
    turn by most of its letters. Code, links, numbers, LaTeX commands and single Latin or Greek letters (variables)
    do not count. Without any letter in the answer or the user's turn there is nothing to compare: `without_letters`, or
    an abstention, which masks the sample. ValueError for an unknown `scope` or `language`.
    """
    _check(scope, language)
    expected = LANGUAGES[language] if language else _scripts_of_question(sample)
    letters = _letters(sample.final if scope == "final" else sample.completion)
    if not expected or not letters:
        reason = "no letters in the answer" if expected else "no letters in the user's turn"
        return Abstain(reason) if without_letters is None else Score(without_letters, reason)
    fitting = sum(letters[script] for script in expected)
    total = letters.total()
    return Score(fitting / total, f"{fitting} of {total} letters are {' or '.join(expected).lower()}")


def _check(scope: str, language: str | None) -> None:
    if scope not in ("final", "completion"):
        raise ValueError(f"scope = {scope}: must be final or completion. Correct the params of language_consistency")
    if language is not None and language not in LANGUAGES:
        known = ", ".join(sorted(LANGUAGES))
        raise ValueError(f"language = {language}: must be null or one of {known}. Correct the params")


def _scripts_of_question(sample: RewardInput) -> tuple[str, ...]:
    """The scripts of the last user turn's language; empty without letters."""
    turns = [message["content"] for message in sample.messages if message["role"] == "user"]
    letters = _letters(turns[-1]) if turns else Counter[str]()
    if not letters:
        return ()
    japanese = sum(letters[script] for script in LANGUAGES["japanese"])
    if any(letters[script] for script in _KANA) and 2 * japanese > letters.total():
        return LANGUAGES["japanese"]
    return (letters.most_common(1)[0][0],)


def _letters(text: str) -> Counter[str]:
    """Letters of the prose by script. A run is letters of one script side by side: in `x는` there are two."""
    counts: Counter[str] = Counter()
    prose = unicodedata.normalize("NFC", _NO_PROSE.sub(" ", text))
    for script, run in itertools.groupby(map(_script, prose)):
        letters = len(list(run))
        if script and (letters > 1 or script not in _SIGN_SCRIPTS):
            counts[script] += letters
    return counts


def _script(character: str) -> str:
    """How the Unicode name of a letter begins; empty for all else and for letters that mathematics borrowed."""
    if not character.isalpha():
        return ""
    first, _, rest = unicodedata.name(character, "").replace("-", " ").partition(" ")
    script = rest.partition(" ")[0] if first in _FORMS else first
    return _HAN if script == "IDEOGRAPHIC" else "" if script in _BORROWED else script
