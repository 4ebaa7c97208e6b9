"""Words, sentences and keywords of a text, without data files. Each rule is stated where it is.

Against IFEval's: words are its `\\w+` except that the vowel signs of Hindi, Thai and the like belong to their word and
that each Han or kana character is a word. Sentences follow its Punkt model in spirit: `. ! ?` before white space, not
after abbreviations, initials and the marker of a list item, never at a line end alone.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator

_MARKS = "".join(chr(code) for code in range(0x300, 0xFE30) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
_SYLLABIC = "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han: no spaces between words
_WORD = re.compile(rf"[{_SYLLABIC}]|(?:(?![{_SYLLABIC}])[\w{_MARKS}])+")
_LETTER = re.compile(r"[^\W_]")

_UNSPACED = re.compile(rf"[{_SYLLABIC}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # also Thai, Lao, Burmese, Khmer
_HANGUL = re.compile(r"[\u1100-\u11ff\uac00-\ud7a3]")

_ENDING = re.compile(r"(?:(?<![.!?…])[.!?…]++[\"'”’)\]»*_]*+(?=\s|\Z))|[。！？｡।॥]+[」』”’\"]*")
_NEXT = re.compile(r"\s*(\S)")
_LIST_MARKER = re.compile(r"(?:^|\n)[ \t>#*_]*(?:\d{1,3}|[A-Za-z])\Z")
_ABBREVIATION = re.compile(
    r"mr|mrs|ms|dr|prof|st|jr|sr|vs|fig|vol|pp|approx|dept|gen|sen|rep|gov|capt|lt|col|sgt|mt|rev|hon|e\.g|i\.e|cf|viz"
    r"|jan|feb|mar|apr|aug|sept|oct|nov|dec|messrs|ph\.d"
)
_MAYBE_ABBREVIATION = re.compile(r"etc|inc|ltd|co|corp|al|.*\..*")  # these end a sentence unless lower case follows


def words(text: str) -> list[str]:
    """The words of `text`: runs of letters, digits and `_`, at least one of them no `_`."""
    return [word for word in _WORD.findall(text) if _LETTER.search(word)]


def has_words(text: str) -> bool:
    return _LETTER.search(text) is not None


def sentences(text: str) -> list[str]:
    """The sentences of `text` that have a word in them, without surrounding white space."""
    return [sentence.strip() for sentence in _split(text) if has_words(sentence)]


def collapsed(items: Iterable[str]) -> list[str]:
    """`items` with each run of the same item as one: repeating a word or a sentence adds nothing."""
    return [item for item, _ in itertools.groupby(items, key=fold)]


def fold(text: str) -> str:
    """`text` with differences of case, width and typographic variant removed."""
    return unicodedata.normalize("NFKC", text).casefold()


@functools.lru_cache(maxsize=4096)
def keyword_pattern(keyword: str) -> re.Pattern[str]:
    """What finds `keyword` as a whole word in folded text.

    A letter or digit may not touch it, except where its script puts no spaces between words (Han, kana, Thai, ...) and
    after Hangul, which takes particles.
    """
    folded = " ".join(fold(keyword).split())
    left = "" if _UNSPACED.match(folded[0]) or not folded[0].isalnum() else rf"(?<![^\W_])(?<![{_MARKS}])"
    open_right = _UNSPACED.match(folded[-1]) or _HANGUL.match(folded[-1]) or not has_words(folded[-1])
    right = "" if open_right else rf"(?![^\W_]|[{_MARKS}])"
    return re.compile(left + re.escape(folded).replace(r"\ ", r"\s+") + right)


def contains(text: str, keyword: str) -> bool:
    """Whether `keyword` is in `text` as a whole word."""
    return keyword_pattern(keyword).search(fold(text)) is not None


def occurrences(text: str, keyword: str) -> int:
    """How often `keyword` is in `text` as a whole word."""
    return len(keyword_pattern(keyword).findall(fold(text)))


def spread_occurrences(text: str, keyword: str) -> int:
    """As `occurrences`, with those that no other word separates counted once."""
    folded = fold(text)
    return spread(folded, keyword_pattern(keyword).finditer(folded))


def spread(text: str, matches: Iterable[re.Match[str]]) -> int:
    """How many matches there are when equal ones with no word between them count once."""
    count, previous = 0, None
    for match in matches:
        repeated = previous is not None and fold(previous.group()) == fold(match.group())
        if previous is None or not repeated or has_words(text[previous.end() : match.start()]):
            count += 1
        previous = match
    return count


def _split(text: str) -> Iterator[str]:
    start = 0
    for ending in _ENDING.finditer(text):
        if not _goes_on(text, start, ending):
            yield text[start : ending.end()]
            start = ending.end()
    yield text[start:]


def _goes_on(text: str, start: int, ending: re.Match[str]) -> bool:
    """Whether the sentence goes on after this full stop or ellipsis."""
    marks = ending.group().rstrip("\"'”’)]»*_")
    following = _NEXT.match(text, ending.end())
    lower_follows = following is not None and following.group(1).islower()
    if marks in ("...", "…"):
        return lower_follows
    if marks != ".":
        return False
    before = text[max(start, ending.start() - 40) : ending.start()]
    if _LIST_MARKER.search(before) or (not before.strip().strip("*_#>") and start == 0):
        return True
    token = before.split()[-1].lstrip("(['\"“*_") if before.split() else ""
    if _ABBREVIATION.fullmatch(token.casefold()) or (len(token) == 1 and token.isupper() and token != "I"):
        return True
    return lower_follows and _MAYBE_ABBREVIATION.fullmatch(token.casefold()) is not None
