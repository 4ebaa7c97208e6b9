"""Is a text in the language asked for? By script where a script has one language, else by words or by lingua.

Deterministic and offline. lingua runs in its low-accuracy mode (40 MB and 0.4 s to load instead of 400 MB and 6 s) on
stretches of 80 letters or more, where it hardly loses anything.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rewards.instruction.words import sentences, words

_LATIN = [
    "en",
    "es",
    "pt",
    "fr",
    "de",
    "it",
    "pl",
    "vi",
    "sw",
    "fi",
    "nl",
    "sv",
    "da",
    "tr",
    "id",
    "cs",
    "ro",
    "hu",
    "ca",
]
_CYRILLIC = ["ru", "uk", "bg", "be", "sr", "mk", "kk", "mn"]
_ARABIC = ["ar", "fa", "ur"]
_SINGLE = {
    "ko": "HANGUL", "th": "THAI", "he": "HEBREW", "ta": "TAMIL", "te": "TELUGU", "kn": "KANNADA", "ml": "MALAYALAM",
    "gu": "GUJARATI", "pa": "GURMUKHI", "bn": "BENGALI", "el": "GREEK", "ka": "GEORGIAN", "hy": "ARMENIAN",
}  # fmt: skip
_SHARED = {"LATIN": _LATIN, "CYRILLIC": _CYRILLIC, "ARABIC": _ARABIC, "DEVANAGARI": ["hi", "mr", "ne"]}
_SCRIPTS: dict[str, tuple[str, ...]] = (
    {code: (script,) for code, script in _SINGLE.items()}
    | {code: (script,) for script, codes in _SHARED.items() for code in codes}
    | {"ja": ("HIRAGANA", "KATAKANA", "CJK"), "zh": ("CJK",)}
)
_ALIASES = {"zh-cn": "zh", "zh-tw": "zh"}

LANGUAGES = (*sorted(_SCRIPTS), *_ALIASES)
"""ISO 639-1 codes that can be checked: IFEval's thirty and their neighbours."""

_NO_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|(?<!\S)\S+@\S+", re.DOTALL)
_MIN_SCRIPT_SHARE, _MIN_LANGUAGE_SHARE = 0.8, 0.7
_UNSURE_LETTERS, _STRETCH_LETTERS = 20, 80

# Words and word endings that one of the three Devanagari languages has and the others have not.
_DEVANAGARI_WORDS = {
    "hi": "है हैं का की के में से और यह वह नहीं था थी थे लिए भी ने आप हम इस उस कि",
    "mr": "आहे आहेत आणि या हे नाही होते होता ते मी तुम्ही आपण असे हा ही करा पण तर आम्ही",
    "ne": "छ छन् र पनि हुन्छ भएको यो छैन थियो थिए तपाईं हामी गर्न गर्नुहोस् हुन् छु छौं",
}
_DEVANAGARI_ENDINGS = {
    "mr": ("च्या", "मध्ये", "साठी", "ांना", "ांचा", "ाची", "ाचे"),
    "ne": ("हरू", "हरु", "लाई", "हरूको"),
}


def fault(text: str, code: str) -> str:
    """Why `text` is not in the language `code` of LANGUAGES; "" when it is.

    Nothing but code, links and signs is in no language. At least 80 % of the letters must be in its script, and 70 % in
    stretches that are judged to be in the language; below 20 letters the script alone decides, as lingua only guesses.
    """
    code = _ALIASES.get(code, code)
    prose = unicodedata.normalize("NFC", _NO_PROSE.sub(" ", text))
    scripts = Counter(script for character in prose if (script := _script(character)))
    if not scripts:
        return "no text in any language"
    share = sum(scripts[name] for name in _SCRIPTS[code]) / scripts.total()
    if share < _MIN_SCRIPT_SHARE:
        return f"{share:.0%} of the letters are {' or '.join(_SCRIPTS[code]).lower()}"
    if code == "ja" and not scripts["HIRAGANA"] + scripts["KATAKANA"]:
        return "no kana"
    script = _SCRIPTS[code][0]
    if script == "DEVANAGARI":
        return _devanagari_fault(prose, code)
    if script not in _SHARED or scripts.total() < _UNSURE_LETTERS:
        return ""
    return _shared_fault(prose, code, _SHARED[script])


def _devanagari_fault(prose: str, code: str) -> str:
    counts = {language: _devanagari_count(words(prose), language) for language in _DEVANAGARI_WORDS}
    best = max(counts, key=lambda language: counts[language])
    return "" if counts[code] == counts[best] else f"reads as {best}, not {code}"


def _devanagari_count(tokens: list[str], language: str) -> int:
    endings = _DEVANAGARI_ENDINGS.get(language, ())
    known = _DEVANAGARI_WORDS[language].split()
    return sum(token in known or token.endswith(endings or ("\0",)) for token in tokens)


def _shared_fault(prose: str, code: str, candidates: list[str]) -> str:
    detector = _detector(tuple(candidates))
    found: Counter[str] = Counter()
    for stretch in _stretches(prose):
        language = detector.detect_language_of(stretch.lower())
        found[language.iso_code_639_1.name.lower() if language else code] += len(stretch)
    if found[code] >= _MIN_LANGUAGE_SHARE * found.total():
        return ""
    return f"{found[code] / found.total():.0%} reads as {code}, most as {found.most_common(1)[0][0]}"


def _stretches(prose: str) -> Iterator[str]:
    """`prose` in pieces of whole sentences with at least 80 letters each; what is left over joins the last one."""
    pieces: list[str] = []
    for sentence in sentences(prose.replace("\n\n", ". ")):
        if pieces and sum(map(str.isalpha, pieces[-1])) < _STRETCH_LETTERS:
            pieces[-1] += " " + sentence
        else:
            pieces.append(sentence)
    if len(pieces) > 1 and sum(map(str.isalpha, pieces[-1])) < _STRETCH_LETTERS:
        last = pieces.pop()
        pieces[-1] += " " + last
    yield from pieces


@functools.cache
def _script(character: str) -> str:
    """The script of a letter as its Unicode name begins; "" for what is no letter or has no script."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").replace("-", " ").split(" ")
    return first[1] if first[0] in ("FULLWIDTH", "HALFWIDTH") and len(first) > 1 else first[0]


@functools.cache
def _detector(candidates: tuple[str, ...]) -> Any:
    """lingua restricted to `candidates`. ImportError with the command that installs it when it is missing."""
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError as error:
        raise ImportError(
            "lingua-language-detector is not installed: languages that share a script cannot be told apart. "
            "Install it: pip install lingua-language-detector"
        ) from error
    builder = LanguageDetectorBuilder.from_languages(*map(_lingua, candidates))
    return builder.with_low_accuracy_mode().build()


def _lingua(code: str) -> Any:
    from lingua import IsoCode639_1, Language

    return Language.from_iso_code_639_1(getattr(IsoCode639_1, code.upper()))
