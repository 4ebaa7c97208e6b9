"""Short texts under constraints in IFEval's vocabulary, verified by `instruction_following`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rollouts.tasks.families import Problem, task_family

# With these words every demonstration reads as English, also to a detector that is unsure of short texts.
_VOCABULARY = (
    ("cat", "duck", "bee", "lion", "bear", "king", "mouse", "man"),
    ("came", "left", "stood", "was", "looked", "played", "stayed", "won"),
    ("first", "again", "early", "today", "away", "quickly", "below", "inside"),
)
_LEAD = ("this", "time", "we", "knew", "that")  # as many of its last words as the asked length leaves room for
_ROOM = 3  # lengths asked for: one of so many next to each other

_STYLES: dict[str, tuple[str, Callable[[str], str]]] = {
    "in lowercase": ("change_case:english_lowercase", str),
    "in capitals": ("change_case:english_capital", str.upper),
    "in quotes": ("startend:quotation", '"{}"'.format),
    "without commas": ("punctuation:no_comma", str),
}


def _axes(difficulty: int) -> tuple[Sequence[Any], ...]:
    """One keyword more at difficulty 2 and 3, and a longer text at each step."""
    keywords = _VOCABULARY[: min(difficulty, len(_VOCABULARY))]
    shortest = difficulty + 2
    return tuple(_STYLES), range(shortest, shortest + _ROOM), *keywords


@task_family("constrained", _axes, reward="instruction_following")
def _constrained(style: str, length: int, *keywords: str) -> Problem:
    """`Use cat, came. At least 5 words, in quotes.`; the hasty text breaks the style."""
    name, write = _STYLES[style]
    spoken = ["the", *keywords]
    lead = max(0, length - len(spoken))
    words = [*_LEAD[len(_LEAD) - lead :], *spoken]
    question = f"Use {', '.join(keywords)}. At least {length} words, {style}."
    constraints = {
        "keywords:existence": {"keywords": list(keywords)},
        "length_constraints:number_words": {"relation": "at least", "num_words": length},
        name: {},
    }
    metadata = {"instruction_id_list": list(constraints), "kwargs": list(constraints.values())}
    trace = f"{length},{style.rsplit(maxsplit=1)[-1]}"
    return Problem(question, write(" ".join(words)), trace, question, _hasty(words), metadata)


def _hasty(words: list[str]) -> str:
    """The words as a sentence with a comma: neither lower-case nor in capitals or quotes."""
    text = " ".join(words[:-1]) + ", " + words[-1]
    return text[0].upper() + text[1:]
