"""Where in a final answer the answer is. Every search is linear in the length of the text."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)\s*\{|[{}]")
_PHRASE = re.compile(
    r"(?:answer\s*(?:is|:|=)|####|정답은|정답\s*:|답은|답\s*:|respuesta(?:\s+final)?\s*(?:es|:))[\s:*]*", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[!?。]|\n")
_NUMBER = re.compile(
    r"(?<![\w.,\\])(?:(?<![\d)\]}])-|−)?(?:\\?[$€£₩])?\s?(?:\\[dt]?frac\{-?\d+\}\{-?\d+\}"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)(?:\s?\\?%)?"
)


def last_boxed(text: str) -> str | None:
    """The inside of the balanced `\\boxed{...}` (or `\\fbox`) that starts last; None when there is none."""
    open_braces: list[int | None] = []  # for a box where its inside starts, else None
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            open_braces.append(match.end() if len(token) > 1 else None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, match.start())
    return text[best[0] : best[1]].strip() if best else None


def after_phrase(text: str) -> str | None:
    """What follows the last "answer is" / "Answer:" / "####", to the end of its sentence; None when there is none."""
    matches = list(_PHRASE.finditer(text))
    if not matches:
        return None
    tail = text[matches[-1].end() :]
    end = _SENTENCE_END.search(tail)
    return _unwrap(tail[: end.start()] if end else tail) or None


def last_number(text: str) -> str | None:
    """The last number in `text` as it is written there, with its sign and percent sign; None when there is none."""
    matches = list(_NUMBER.finditer(text))
    return matches[-1].group().strip() if matches else None


def _unwrap(text: str) -> str:
    """`text` without emphasis and the delimiters of a formula round all of it."""
    text = text.replace("**", "").strip().strip(",;:").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            return text[len(left) : -len(right)].strip()
    return text
