"""What of a completion counts: the text a reader sees, and of that the part that is not copied from the request."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from rewards.instruction.words import has_words, sentences, words

_HTML_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_MARKDOWN_COMMENT = re.compile(r"^[ \t]*\[[^\]\n]*\]:[ \t]*(?:#|<>)[ \t]*(?:[(\"'].*)?$", re.MULTILINE)
_BLANK_LETTERS = "\u115f\u1160\u3164\uffa0\u2800\u034f"  # letters and signs by category that are drawn as nothing
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)

_MIN_COPIED_WORDS = 5
_CONSTRAINT = re.compile(
    r"\b(?:response|answers?|reply|include|contain\w*|make sure|must|should|at least|less than|do not|don't|refrain"
    r"|avoid|wrap\w*|keywords?|words?|letters?|sentences?|paragraphs?|sections?|bullets?|highlight\w*|placeholders?|title"
    r"|postscript|finish|format|capital\w*|lowercase|commas?|write|repeat|start|end)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Response:
    """A final answer as its reader sees it.

    `text`: without comments and invisible characters, NFC. `own`: `text` without sentences of at least five words that
    repeat, word for word, a sentence of the request that states a constraint (in English), and without the request that
    was to be repeated; what proves that something was *written* is counted here. `request`: the last user turn.
    """

    text: str
    own: str
    request: str = ""

    @classmethod
    def of(cls, text: str, request: str = "", repeated: str = "") -> Response:
        """The response with this visible text; `repeated` is what it was told to say first."""
        own = after(text, visible(repeated)) if repeated else None
        return cls(text, without_constraints(text if own is None else own, request), request)

    @property
    def empty(self) -> bool:
        return not has_words(self.text)


def visible(completion: str) -> str:
    """`completion` without HTML and Markdown comments and without characters that are drawn as nothing; NFC."""
    text = completion.replace("\r\n", "\n").replace("\r", "\n")
    text = _MARKDOWN_COMMENT.sub("", _HTML_COMMENT.sub("", text))
    return unicodedata.normalize("NFC", "".join(c for c in text if not _invisible(c))).strip()


def after(text: str, beginning: str) -> str | None:
    """What follows `beginning` in `text`, case and white space aside; None when `text` does not begin so."""
    pattern = r"\s+".join(re.escape(part) for part in beginning.split())
    match = re.match(pattern, text.lstrip(), re.IGNORECASE)
    return text.lstrip()[match.end() :] if match else None


def without_constraints(text: str, request: str) -> str:
    """`text` without the sentences of `request` that state a constraint, where it repeats them word for word."""
    for sentence in sentences(request):
        copied = words(sentence)
        if len(copied) >= _MIN_COPIED_WORDS and _CONSTRAINT.search(sentence):
            text = re.sub(r"(?<!\w)" + r"\W+".join(map(re.escape, copied)) + r"(?!\w)", " ", text, flags=re.IGNORECASE)
    return text


def loose_variants(text: str) -> Iterator[str]:
    """IFEval's eight: as it is, without the first line, the last, both; and each of these without asterisks."""
    lines = text.split("\n")
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        variant = "\n".join(kept).strip()
        yield variant
        yield variant.replace("*", "")


def _invisible(character: str) -> bool:
    if character in "\n\t":
        return False
    if character in _BLANK_LETTERS or ord(character) in _VARIATION_SELECTORS:
        return True
    return unicodedata.category(character) in ("Cf", "Cc", "Cn", "Co", "Cs")
