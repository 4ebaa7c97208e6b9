"""Where the answer is in a final text."""

from __future__ import annotations

import time

import pytest

from rewards.answers import after_phrase, last_boxed, last_number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{18}", "18"),
        (r"\boxed{17} no, \boxed{18}.", "18"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{18} and \boxed{19", "18"),
        (r"\boxed{\boxed{18}}", "18"),
        (r"\fbox {18}", "18"),
        (r"\boxed{}", ""),
        (r"\boxed{18", None),
        ("18", None),
        (r"} \boxed{18}", "18"),
        (r"\left\{ \boxed{18}", "18"),
    ],
)
def test_the_box_that_starts_last_and_is_balanced_counts(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("The answer is 18.", "18"),
        ("The answer is 17. Wait, the answer is 18. Good.", "18"),
        ("**Answer:** 18", "18"),
        ("Final answer:\n\n$18$", "18"),
        ("so\n#### 18", "18"),
        ("The answer is 3.5 because", "3.5 because"),
        (r"The answer is \(x^2\).", "x^2"),
        ("정답은 18", "18"),
        ("18", None),
        ("The answer is", None),
    ],
)
def test_the_rest_of_the_sentence_after_the_last_phrase_counts(text: str, tail: str | None) -> None:
    assert after_phrase(text) == tail


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 7 = 12", "12"),
        ("costs $1,234.50.", "$1,234.50"),
        ("it is -3", "-3"),
        ("10-5", "5"),
        ("about 15%", "15%"),
        ("3/4 of it", "3/4"),
        ("in H2O", None),
        ("18, 19", "19"),
        ("none", None),
    ],
)
def test_the_last_number_is_taken_as_it_is_written(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize("unit", [r"\boxed{", "answer is ", "1,", "#### ", "-$", "{", "1.1", r"\frac{1}{", "1/1"])
def test_searches_stay_fast_on_long_repetitive_text(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    started = time.perf_counter()
    for search in (last_boxed, after_phrase, last_number):
        search(text)
    assert time.perf_counter() - started < 2.0
