"""Each of IFEval's 25 instructions on texts that follow it, break it, or stand at the border."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rewards.instruction import Response
from rewards.instruction.registry import find, ids
from rewards.instruction.response import visible

Case = tuple[str, dict[str, Any], str, bool]


def follows(instruction_id: str, kwargs: dict[str, Any], text: str, request: str = "") -> bool:
    found = find(instruction_id, "test")
    arguments = found.arguments(kwargs, "test")
    response = Response.of(visible(text), request, kwargs.get("prompt_to_repeat", ""))
    return not found.broken(response, arguments)


MOM = {"keywords": ["mom", "café"]}
TWICE = {"relation": "at least", "keyword": "river", "frequency": 2}
RARELY = TWICE | {"relation": "less than"}
NO_ROCK = {"forbidden_words": ["rock", "can", "정답"]}
Q3 = {"let_relation": "at least", "letter": "q", "let_frequency": 3}
BANG = {"let_relation": "less than", "letter": "!", "let_frequency": 2}
CAPS2 = {"capital_relation": "at least", "capital_frequency": 2}
WORDS3 = {"relation": "at least", "num_words": 3}
WORDS_BELOW3 = {"relation": "less than", "num_words": 3}
SENTENCES2 = {"relation": "at least", "num_sentences": 2}
SENTENCES_BELOW2 = {"relation": "less than", "num_sentences": 2}
SECOND = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"}
SECTIONS2 = {"section_spliter": "SECTION", "num_sections": 2}
REPEAT = {"prompt_to_repeat": "Write a poem\nabout <<rain>>."}
ENGLISH = "this answer talks about the weather in the mountains and what to wear there in early spring"
GERMAN = "Diese Antwort handelt vom Wetter in den Bergen und davon, was man dort im Frühling anziehen sollte."

CASES: list[Case] = [
    ("keywords:existence", MOM, "My mom loves that café.", True),
    ("keywords:existence", MOM, "MOM and CAFÉ", False),  # nothing but the list
    ("keywords:existence", MOM, "Her MOM said: cafe\u0301!", True),  # decomposed accent, upper case
    ("keywords:existence", MOM, "The moment at the café", False),  # a part of a word
    ("keywords:existence", MOM, "A story.\nKeywords: mom, café", False),
    ("keywords:existence", MOM, "_mom_ at the **café**", True),
    ("keywords:existence", {"keywords": ["고양이", "猫"]}, "고양이는 귀엽다。黒猫だ", True),
    ("keywords:frequency", TWICE, "A river meets a river.", True),
    ("keywords:frequency", TWICE, "river river river river", False),
    ("keywords:frequency", TWICE, "A river and rivers", False),
    ("keywords:frequency", TWICE, "River, then the ＲＩＶＥＲ", True),
    ("keywords:frequency", RARELY, "One river", True),
    ("keywords:frequency", RARELY, "river river", False),
    ("keywords:frequency", RARELY, "ri\u200bver and river", False),
    ("keywords:forbidden_words", NO_ROCK, "A rocket cannot", True),
    ("keywords:forbidden_words", NO_ROCK, "It ROCKs? No: rock!", False),
    ("keywords:forbidden_words", NO_ROCK, "r\u200bo\u2060c\u00adk", False),
    ("keywords:forbidden_words", NO_ROCK, "ｒｏｃｋ", False),
    ("keywords:forbidden_words", NO_ROCK, "정답은 둘", False),
    ("keywords:forbidden_words", NO_ROCK, "stone", True),
    ("keywords:letter_frequency", Q3, "Quick queens quit", True),
    ("keywords:letter_frequency", Q3, "qqqqqqqq", False),
    ("keywords:letter_frequency", Q3, "quick queen", False),
    ("keywords:letter_frequency", Q3, "quick queen q", True),
    ("keywords:letter_frequency", BANG, "Hey!", True),
    ("keywords:letter_frequency", BANG, "Hey!!", False),
    ("keywords:letter_frequency", Q3 | {"letter": "É"}, "été né", True),
    ("language:response_language", {"language": "de"}, GERMAN, True),
    ("language:response_language", {"language": "de"}, ENGLISH, False),
    ("language:response_language", {"language": "de"}, f"{GERMAN} {ENGLISH}. {ENGLISH}.", False),
    ("language:response_language", {"language": "en"}, ENGLISH, True),
    ("language:response_language", {"language": "ko"}, "오늘은 날씨가 좋고 바람이 시원합니다.", True),
    ("language:response_language", {"language": "ko"}, "Today it is sunny and 시원합니다.", False),
    ("language:response_language", {"language": "hi"}, "यह एक अच्छा दिन है और मौसम सुहावना है।", True),
    ("language:response_language", {"language": "mr"}, "आज हवामान चांगले आहे आणि वारा थंड आहे.", True),
    ("language:response_language", {"language": "ne"}, "आज मौसम राम्रो छ र हावा चिसो छ।", True),
    ("language:response_language", {"language": "ne"}, "यह एक अच्छा दिन है और मौसम सुहावना है।", False),
    ("language:response_language", {"language": "kn"}, "ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ", True),
    ("language:response_language", {"language": "ja"}, "今日は天気がいいです。", True),
    ("language:response_language", {"language": "ja"}, "今天天气很好。", False),
    ("language:response_language", {"language": "bg"}, "Времето днес е хубаво и хората се разхождат в парка.", True),
    ("language:response_language", {"language": "ru"}, "Времето днес е хубаво и хората се разхождат в парка.", False),
    ("language:response_language", {"language": "fa"}, "امروز هوا خوب است و مردم در پارک قدم می\u200cزنند.", True),
    ("language:response_language", {"language": "ar"}, "امروز هوا خوب است و مردم در پارک قدم می\u200cزنند.", False),
    ("language:response_language", {"language": "de"}, "12345 + 6", False),
    ("change_case:english_capital", {}, ENGLISH.upper(), True),
    ("change_case:english_capital", {}, ENGLISH.upper() + " x", False),
    ("change_case:english_capital", {}, GERMAN.upper(), False),
    ("change_case:english_capital", {}, "YES, 42.", True),
    ("change_case:english_capital", {}, "42.", False),
    ("change_case:english_lowercase", {}, ENGLISH, True),
    ("change_case:english_lowercase", {}, ENGLISH.capitalize(), False),
    ("change_case:english_lowercase", {}, GERMAN.lower(), False),
    ("change_case:english_lowercase", {}, "no, 42.", True),
    ("change_case:english_lowercase", {}, ENGLISH + " É", False),
    ("change_case:capital_word_frequency", CAPS2, "NASA and the EU", True),
    ("change_case:capital_word_frequency", CAPS2, "WOW WOW WOW", False),
    ("change_case:capital_word_frequency", CAPS2, "STATE-OF-THE-ART only", False),
    ("change_case:capital_word_frequency", CAPS2, "I saw A dog", True),
    ("change_case:capital_word_frequency", CAPS2, "ÉTÉ, DON'T", True),
    ("change_case:capital_word_frequency", CAPS2 | {"capital_relation": "less than"}, "WOW WOW", False),
    ("change_case:capital_word_frequency", CAPS2 | {"capital_relation": "less than"}, "WOW wow", True),
    ("length_constraints:number_words", WORDS3, "one two three", True),
    ("length_constraints:number_words", WORDS3, "one two", False),
    ("length_constraints:number_words", WORDS3, "spam spam spam spam", False),
    ("length_constraints:number_words", WORDS3, "one two <!-- three four -->", False),
    ("length_constraints:number_words", WORDS3, "one-two-three", True),
    ("length_constraints:number_words", WORDS_BELOW3, "हिन्दी भाषा", True),  # vowel signs do not split words
    ("length_constraints:number_words", WORDS_BELOW3, "one two", True),
    ("length_constraints:number_words", WORDS_BELOW3, "one two three", False),
    ("length_constraints:number_sentences", SENTENCES2, "It rains. It pours!", True),
    ("length_constraints:number_sentences", SENTENCES2, "Dr. Smith met Mr. J. Doe, e.g. at 3.14 p.m. today.", False),
    ("length_constraints:number_sentences", SENTENCES2, "Yes. Yes. Yes.", False),
    ("length_constraints:number_sentences", SENTENCES2, "1. First\n2. Second", False),
    ("length_constraints:number_sentences", SENTENCES2, "He left... and came back. “Why?” Nobody knows", True),
    ("length_constraints:number_sentences", SENTENCES2, "今日は晴れ。明日は雨。", True),
    ("length_constraints:number_sentences", SENTENCES_BELOW2, "He waited... and waited", True),
    ("length_constraints:number_sentences", SENTENCES_BELOW2, "Yes. Yes.", False),
    ("length_constraints:number_sentences", SENTENCES_BELOW2, "Visit example.com for v2.0", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\nOne *** Two\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\n***\nTwo", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***bold*** One\n\nTwo", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\n<!-- Two -->", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "하나\n******\n둘", False),
    ("length_constraints:nth_paragraph_first_word", SECOND, "One\n\nElm trees", True),
    ("length_constraints:nth_paragraph_first_word", SECOND, "One\n\n\n\n**\"Elm\"** trees", True),
    ("length_constraints:nth_paragraph_first_word", SECOND, "One\n\nElmer", False),
    ("length_constraints:nth_paragraph_first_word", SECOND, "One\n\nElm\n\nThree", False),
    ("length_constraints:nth_paragraph_first_word", SECOND, "Elm\n\nTwo", False),
    ("length_constraints:nth_paragraph_first_word", SECOND | {"first_word": "Été"}, "Un\n\n«ÉTÉ» deux", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], of [주소]", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name][name][name]", False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[link](http://a.b) [1] [ ] [x] [name]", False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] and again [name]", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[comment]: # (a [b])\n[a] c", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Text.\n\nP.S. Bye", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Text.\n\nP.P.S. Bye", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Text.\n\nP.S.", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Text.\n\n**p. s. bye**", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Text.\nP.P.S. 안녕", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Text.\nP.S. Bye", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n  - two", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two\n* three", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n*two*\n**three**\n---\n- ", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "- 하나\n---\n* **둘**", True),
    ("detectable_format:constrained_response", {}, "My answer is yes.", True),
    ("detectable_format:constrained_response", {}, "Well: my answer is **no**".replace("*", ""), True),
    ("detectable_format:constrained_response", {}, "My answer is yes. My answer is no. My answer is maybe.", False),
    ("detectable_format:constrained_response", {}, "My answer is nothing", False),
    ("detectable_format:constrained_response", {}, "Yes", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **zwei**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* *one* *one*", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "* one\n* two\n** **", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*강조 하나* 2 * 3 * 4 ***둘***", True),
    ("detectable_format:multiple_sections", SECTIONS2, "SECTION 1\nrain\nSECTION 2\nsun", True),
    ("detectable_format:multiple_sections", SECTIONS2, "SECTION 1 SECTION 2", False),
    ("detectable_format:multiple_sections", SECTIONS2, "## SECTION 1: 비\n**SECTION 2**\n해", True),
    ("detectable_format:multiple_sections", SECTIONS2, "SECTION 1\nrain\nSECTION 1\nsun", False),
    ("detectable_format:multiple_sections", SECTIONS2, "SECTION 1\nrain\nSECTION 2\n", False),
    ("detectable_format:json_format", {}, '{"a": "é"}', True),
    ("detectable_format:json_format", {}, '```json\n[1, 2]\n```', True),
    ("detectable_format:json_format", {}, '"only a text"', False),
    ("detectable_format:json_format", {}, '{"a": NaN}', False),
    ("detectable_format:json_format", {}, 'Here: {"a": 1}', False),
    ("detectable_format:json_format", {}, "{}", False),
    ("detectable_format:json_format", {}, "[" * 100_000, False),
    ("detectable_format:title", {}, "<<Ode to Rain>>\ntext", True),
    ("detectable_format:title", {}, "<<비의 노래>>", True),
    ("detectable_format:title", {}, "<<title>>", False),
    ("detectable_format:title", {}, "<< >> <Rain>", False),
    ("detectable_format:title", {}, "<!-- <<Rain>> -->text", False),
    ("combination:two_responses", {}, "One.\n******\nTwo.", True),
    ("combination:two_responses", {}, "******\n하나\n******\n둘\n******", True),
    ("combination:two_responses", {}, "One.\n******\nONE!", False),
    ("combination:two_responses", {}, "One.\n*****\nTwo.", False),
    ("combination:two_responses", {}, "One ****** Two ****** Three", False),
    ("combination:repeat_prompt", REPEAT, "Write a poem\nabout <<rain>>.\n\nDrip.", True),
    ("combination:repeat_prompt", REPEAT, "write a poem about <<Rain>>. Drip.", True),
    ("combination:repeat_prompt", REPEAT, "Write a poem about <<rain>>.", False),
    ("combination:repeat_prompt", REPEAT, "Sure! Write a poem about <<rain>>. Drip.", False),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, "Yes. Is that  ALL?\n", True),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, '"Yes. Is that all?"', True),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, "Is that all? Yes.", False),
    ("startend:end_checker", {"end_phrase": "all"}, "overall", False),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, "Is that all? <!-- bye -->", True),
    ("startend:end_checker", {"end_phrase": "끝입니다."}, "이제 끝입니다.", True),
    ("startend:quotation", {}, '"Quoted"', True),
    ("startend:quotation", {}, "“Quoted”", True),
    ("startend:quotation", {}, '"Quoted" not', False),
    ("startend:quotation", {}, '"', False),
    ("startend:quotation", {}, "'Quoted'", False),
    ("punctuation:no_comma", {}, "No comma here; none", True),
    ("punctuation:no_comma", {}, "One, two", False),
    ("punctuation:no_comma", {}, "하나， 둘、 셋", False),
    ("punctuation:no_comma", {}, "واحد، اثنان", False),
    ("punctuation:no_comma", {}, "it’s ‘fine’", True),
]  # fmt: skip


@pytest.mark.parametrize(("instruction_id", "kwargs", "text", "expected"), CASES)
def test_a_text_follows_an_instruction_or_breaks_it(
    instruction_id: str, kwargs: dict[str, Any], text: str, expected: bool
) -> None:
    assert follows(instruction_id, kwargs, text) is expected


def test_every_instruction_of_ifeval_has_four_cases_with_both_outcomes() -> None:
    cases = {name: [expected for case, _, _, expected in CASES if case == name] for name in ids() if ":" in name}
    ours = {name: outcomes for name, outcomes in cases.items() if not name.startswith("test:")}
    assert len(ours) == 25
    assert all(len(outcomes) >= 4 and {True, False} == set(outcomes) for outcomes in ours.values())


@pytest.mark.parametrize(
    ("instruction_id", "kwargs", "request_text", "text"),
    [
        ("keywords:existence", MOM, "Write. Make sure to use mom and café.", "Make sure to use mom and café."),
        ("length_constraints:number_words", WORDS3, "Use at least three words.", "use at least three words"),
        (
            "detectable_content:number_placeholders",
            {"num_placeholders": 1},
            "The response must contain placeholders such as [address].",
            "Fine. The response must contain placeholders such as [address].",
        ),
        ("detectable_format:title", {}, "You must wrap the title like <<poem of joy>>.",
         "You must wrap the title like <<poem of joy>>."),
    ],
)  # fmt: skip
def test_copying_the_constraint_out_of_the_request_proves_nothing(
    instruction_id: str, kwargs: dict[str, Any], request_text: str, text: str
) -> None:
    assert follows(instruction_id, kwargs, text)
    assert not follows(instruction_id, kwargs, text, request_text)


def test_a_forbidden_word_counts_even_in_a_copied_sentence() -> None:
    request = "Write a poem but do not use the word rock."
    assert not follows("keywords:forbidden_words", {"forbidden_words": ["rock"]}, request, request)


def test_material_quoted_from_the_request_counts() -> None:
    request = "Rewrite this, include the word river: The river runs through old green hills."
    assert follows("keywords:existence", {"keywords": ["river"]}, "The river runs through old green hills!", request)


def test_the_repeated_request_is_no_evidence_for_the_other_instructions() -> None:
    repeated = {"prompt_to_repeat": "A haiku on mom and a café"}
    response = Response.of("A haiku on mom and a café\nRain.", "", repeated["prompt_to_repeat"])
    assert find("keywords:existence", "x").broken(response, MOM) == "no 'mom' in the text"


HOSTILE = [
    "." * 20_000 + "a",
    "[" + "a" * 20_000,
    "```" + " " * 20_000 + "x",
    "a" * 20_000,
    "*" * 20_000,
    "*a " * 8_000,
]
HOSTILE += ["<!--" * 5_000, "<<" * 10_000, "mom " * 5_000, "SECTION 1\n" * 2_000, "A. b. " * 4_000, "[x]: #" * 3_000]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_takes_long(text: str) -> None:
    last_of_each = {case: kwargs for case, kwargs, _, _ in CASES}
    started = time.process_time()
    for instruction_id, kwargs in last_of_each.items():
        follows(instruction_id, kwargs, text, "Your answer must have at least three words. " * 20)
    assert time.process_time() - started < 4.0
