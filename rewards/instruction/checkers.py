"""IFEval's 25 kinds of instruction (arXiv 2311.07911), each as strict as its own wording.

Where something has to be *written* ("at least", keywords, titles, bullets) what is copied from the request does not
count and immediate repetition counts once; where something has to be *avoided* every visible character counts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Literal

from rewards.instruction import languages
from rewards.instruction.registry import Verdict, instruction
from rewards.instruction.response import Response, after, visible
from rewards.instruction.words import (
    collapsed,
    contains,
    fold,
    has_words,
    keyword_pattern,
    occurrences,
    sentences,
    spread,
    spread_occurrences,
    words,
)
from rlhf.errors import DataError

Relation = Literal["at least", "less than"]


def _compare(written: int, seen: int, relation: Relation, wanted: int, what: str) -> Verdict:
    """`written` counts for "at least", `seen`, which is never smaller, for "less than"."""
    count = written if relation == "at least" else seen
    holds = count >= wanted if relation == "at least" else count < wanted
    return holds or f"{count} {what}, {relation} {wanted} wanted"


# --- keywords and letters ---------------------------------------------------------------------------------------------


@instruction("keywords:existence")
def keywords_existence(response: Response, keywords: list[str]) -> Verdict:
    """Every keyword as a whole word, in any case; a line that merely lists several of them does not count."""
    known = {word for keyword in keywords for word in words(fold(keyword))}
    lines = [line for line in response.own.splitlines() if not _lists_keywords(line, keywords, known)]
    missing = [keyword for keyword in keywords if not contains("\n".join(lines), keyword)]
    return not missing or f"no {missing[0]!r} in the text"


def _lists_keywords(line: str, keywords: list[str], known: set[str]) -> bool:
    rest = set(words(fold(line))) - known - {"keyword", "keywords", "words", "and"}
    return not rest and sum(contains(line, keyword) for keyword in keywords) > 1


@instruction("keywords:frequency")
def keywords_frequency(response: Response, relation: Relation, keyword: str, frequency: int) -> Verdict:
    """The keyword as a whole word so many times."""
    written, seen = spread_occurrences(response.own, keyword), occurrences(response.text, keyword)
    return _compare(written, seen, relation, frequency, f"times {keyword!r}")


@instruction("keywords:forbidden_words")
def keywords_forbidden(response: Response, forbidden_words: list[str]) -> Verdict:
    """None of the words as a whole word, in any case or width."""
    found = [word for word in forbidden_words if contains(response.text, word)]
    return not found or f"{found[0]!r} is in the text"


@instruction("keywords:letter_frequency")
def letter_frequency(response: Response, let_relation: Relation, letter: str, let_frequency: int) -> Verdict:
    """The character so many times, in any case. Three or more of a letter in a row count as two: no word has them."""
    letter = unicodedata.normalize("NFC", letter.strip()).lower()
    if len(letter) != 1:
        raise DataError(f"metadata.kwargs.letter = {letter!r}: must be one character. It is counted. Fix the record.")
    own = response.own.lower()
    if letter.isalpha():
        own = re.sub(rf"{re.escape(letter)}{{3,}}", letter * 2, own)
    seen = response.text.lower().count(letter)
    return _compare(own.count(letter), seen, let_relation, let_frequency, f"times {letter!r}")


# --- language and case ------------------------------------------------------------------------------------------------


@instruction("language:response_language")
def response_language(response: Response, language: str) -> Verdict:
    """All of the text in the language with this ISO 639-1 code; see `languages.fault`."""
    code = language.strip().lower()
    if code not in languages.LANGUAGES:
        known = ", ".join(languages.LANGUAGES)
        raise DataError(
            f"metadata.kwargs.language = {language!r}: must be one of {known}. Others cannot be told apart."
        )
    return languages.fault(response.text, code) or True


@instruction("change_case:english_capital")
def english_capital(response: Response) -> Verdict:
    """English without a lower-case letter."""
    return _english(response.text) if response.text.isupper() else "not all letters are capital"


@instruction("change_case:english_lowercase")
def english_lowercase(response: Response) -> Verdict:
    """English without a capital letter."""
    return _english(response.text) if response.text.islower() else "not all letters are lower-case"


def _english(text: str) -> Verdict:
    return languages.fault(text.lower(), "en") or True


@instruction("change_case:capital_word_frequency")
def capital_words(response: Response, capital_relation: Relation, capital_frequency: int) -> Verdict:
    """Words without a lower-case letter; one with hyphens or apostrophes is one word, "I" and "A" are words."""
    written, seen = collapsed(_capital_words(response.own)), _capital_words(response.text)
    return _compare(len(written), len(seen), capital_relation, capital_frequency, "words in capitals")


def _capital_words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+(?:[-'’.&]\w+)*", text) if word.isupper()]


# --- lengths ----------------------------------------------------------------------------------------------------------


@instruction("length_constraints:number_words")
def number_words(response: Response, relation: Relation, num_words: int) -> Verdict:
    written, seen = collapsed(words(response.own)), words(response.text)
    return _compare(len(written), len(seen), relation, num_words, "words")


@instruction("length_constraints:number_sentences")
def number_sentences(response: Response, relation: Relation, num_sentences: int) -> Verdict:
    written, seen = collapsed(sentences(response.own)), sentences(response.text)
    return _compare(len(written), len(seen), relation, num_sentences, "sentences")


@instruction("length_constraints:number_paragraphs")
def number_paragraphs(response: Response, num_paragraphs: int) -> Verdict:
    """Exactly so many paragraphs between dividers of three asterisks; none is empty and a divider may be at an end."""
    paragraphs = re.split(r"(?:(?<=\s)|^)\*{3}(?=\s|$)", response.text)
    if len(paragraphs) > 1 and not has_words(paragraphs[0]):
        paragraphs = paragraphs[1:]
    if len(paragraphs) > 1 and not has_words(paragraphs[-1]):
        paragraphs = paragraphs[:-1]
    if not all(map(has_words, paragraphs)):
        return "an empty paragraph"
    return len(paragraphs) == num_paragraphs or f"{len(paragraphs)} paragraphs, {num_paragraphs} wanted"


@instruction("length_constraints:nth_paragraph_first_word")
def paragraph_first_word(response: Response, num_paragraphs: int, nth_paragraph: int, first_word: str) -> Verdict:
    """Exactly so many paragraphs between blank lines, and the n-th, from 1, begins with the word."""
    if not 1 <= nth_paragraph <= num_paragraphs:
        raise DataError(
            f"metadata.kwargs.nth_paragraph = {nth_paragraph}: must be from 1 to num_paragraphs = {num_paragraphs}. "
            "No other paragraph exists. Fix or drop the record."
        )
    paragraphs = [part for part in re.split(r"\n\s*\n", response.text) if has_words(part)]
    if len(paragraphs) != num_paragraphs:
        return f"{len(paragraphs)} paragraphs, {num_paragraphs} wanted"
    start = re.sub(r"\A[\W_]+", "", fold(paragraphs[nth_paragraph - 1]))
    begins = keyword_pattern(first_word).match(start) is not None
    return begins or f"paragraph {nth_paragraph} does not begin with {first_word!r}"


# --- detectable content -----------------------------------------------------------------------------------------------


@instruction("detectable_content:number_placeholders")
def number_placeholders(response: Response, num_placeholders: int) -> Verdict:
    """At least so many texts in square brackets with a letter in them; links and check boxes are not placeholders."""
    brackets = re.finditer(r"(?<!!)\[(?!x\])([^\[\]\n]*)\](?!\()", response.own, re.IGNORECASE)
    count = spread(response.own, (match for match in brackets if re.search(r"[^\W\d_]", match.group())))
    return count >= num_placeholders or f"{count} placeholders, at least {num_placeholders} wanted"


@instruction("detectable_content:postscript")
def postscript(response: Response, postscript_marker: str) -> Verdict:
    """A postscript: the marker, then words, after the text. Spaces between the marker's letters do not matter."""
    text = fold(response.own)
    marker = r"\s?".join(re.escape(letter) for letter in fold(postscript_marker) if not letter.isspace())
    found = list(re.finditer(rf"(?<![\w.])(?<!\bp\.\s){marker}\.?", text))
    if not found:
        return f"no {postscript_marker!r}"
    return has_words(text[found[-1].end() :]) or f"nothing after {postscript_marker!r}"


# --- detectable format ------------------------------------------------------------------------------------------------

_GENERIC_TITLES = {"title", "the title", "my title", "your title", "a title", "title here", "name"}
_OPTIONS = ("my answer is yes", "my answer is no", "my answer is maybe")


@instruction("detectable_format:number_bullet_lists")
def bullet_points(response: Response, num_bullets: int) -> Verdict:
    """Exactly so many Markdown bullets (`*`, `-`, `+`, a space, then words), nested ones included."""
    bullets = [line for line in re.findall(r"^[ \t>]*[*+-][ \t]+(.*)$", response.text, re.MULTILINE) if has_words(line)]
    return len(bullets) == num_bullets or f"{len(bullets)} bullets, {num_bullets} wanted"


@instruction("detectable_format:constrained_response")
def constrained_response(response: Response) -> Verdict:
    """Exactly one of "My answer is yes." / "no." / "maybe." """
    found = [option for option in _OPTIONS if contains(response.own, option)]
    return len(found) == 1 or f"{len(found)} of the three answers are in the text"


@instruction("detectable_format:number_highlighted_sections")
def highlighted_sections(response: Response, num_highlights: int) -> Verdict:
    """At least so many different texts in `*...*` or `**...**` that begin and end with no space."""
    found = re.findall(r"(?<!\*)\*{1,3}(?=[^\s*])([^*\n]*[^\s*])\*{1,3}", response.own)
    count = len({fold(text) for text in found if has_words(text)})
    return count >= num_highlights or f"{count} highlighted sections, at least {num_highlights} wanted"


@instruction("detectable_format:multiple_sections")
def multiple_sections(response: Response, section_spliter: str, num_sections: int) -> Verdict:
    """At least so many headings with different numbers, each at the start of a line and with words after it."""
    heading = re.compile(rf"^[^\w\n]*{re.escape(section_spliter.strip())}[ \t]*(\d+)", re.MULTILINE)
    _, *parts = heading.split(response.own)
    numbers = {int(number) for number, content in zip(parts[::2], parts[1::2], strict=True) if has_words(content)}
    return len(numbers) >= num_sections or f"{len(numbers)} sections, at least {num_sections} wanted"


@instruction("detectable_format:json_format")
def json_format(response: Response) -> Verdict:
    """All of the text is one JSON object or array with something in it, perhaps in a code fence."""
    text = response.text.strip()
    if len(text) > 6 and text.startswith("```") and text.endswith("```"):
        text = re.sub(r"\A[a-zA-Z]*", "", text[3:-3])
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return (isinstance(value, dict | list) and bool(value)) or "no object or array with something in it"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@instruction("detectable_format:title")
def title(response: Response) -> Verdict:
    """A title in `<<...>>` that is more than the word "title"."""
    titles = re.findall(r"<<([^<>\n]+)>>", response.own)
    named = [text for text in titles if has_words(text) and " ".join(fold(text).split()) not in _GENERIC_TITLES]
    return bool(named) or "no title in <<double angular brackets>>"


# --- combinations, start and end, punctuation -------------------------------------------------------------------------


@instruction("combination:two_responses")
def two_responses(response: Response) -> Verdict:
    """Two answers between exactly six asterisks that differ in more than punctuation and case."""
    answers = [words(fold(part)) for part in re.split(r"(?<!\*)\*{6}(?!\*)", response.text)]
    if len(answers) > 2 and not answers[0]:
        answers = answers[1:]
    if len(answers) > 2 and not answers[-1]:
        answers = answers[:-1]
    if len(answers) != 2 or not all(answers):
        return f"{sum(map(bool, answers))} answers, 2 wanted"
    return answers[0] != answers[1] or "the two answers are the same"


@instruction("combination:repeat_prompt")
def repeat_prompt(response: Response, prompt_to_repeat: str) -> Verdict:
    """The request word for word first, then an answer."""
    rest = after(response.text, visible(prompt_to_repeat))
    if rest is None:
        return "does not begin with the request"
    return has_words(rest) or "no answer after the request"


@instruction("startend:end_checker")
def end_phrase(response: Response, end_phrase: str) -> Verdict:
    """The phrase at the very end, case, white space and quotation marks round the text aside."""
    text = " ".join(fold(response.text.strip().strip('"“”')).split())
    phrase = " ".join(fold(end_phrase.strip().strip('"“”')).split())
    whole = text.endswith(phrase) and not re.search(r"[^\W_]\Z", text[: -len(phrase)])
    return whole or f"does not end with {end_phrase.strip()!r}"


@instruction("startend:quotation")
def quotation(response: Response) -> Verdict:
    """Double quotation marks, straight or curved, round all of the text."""
    text = response.text.strip()
    return (text[:1] in ('"', "“", "„") and text[-1:] in ('"', "”", "“") and len(text) > 2) or "not in quotation marks"


@instruction("punctuation:no_comma")
def no_comma(response: Response) -> Verdict:
    """No comma of any script, nor the low quotation mark that looks like one."""
    commas = sorted({c for c in response.text if c == "," or (not c.isascii() and _is_comma(c))})
    return not commas or f"{commas[0]!r} is in the text"


def _is_comma(character: str) -> bool:
    name = unicodedata.name(character, "")
    return character == "‚" or ("COMMA" in name and unicodedata.category(character) == "Po")
