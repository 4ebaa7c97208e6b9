"""The share of an answer's letters that are in the script it should be in."""

from __future__ import annotations

from typing import Any

import pytest

from rewards.language import LANGUAGES, language_consistency
from rewards.registry import Abstain, RewardInput, Score


def judged(completion: str, question: str = "", **params: Any) -> Score | Abstain:
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": question}]
    return language_consistency(RewardInput.of(completion, messages=messages), **params)


def value(completion: str, question: str = "", **params: Any) -> float:
    score = judged(completion, question, **params)
    assert isinstance(score, Score)
    return score.value


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("사과 세 개와 배 두 개를 더하면?", "모두 다섯 개입니다."),
        ("How many apples are left?", "Five apples are left."),
        ("りんごはいくつ残りますか。", "五個のリンゴが残ります。ケーキも。"),
        ("还剩几个苹果？", "还剩五个苹果。"),
        ("Сколько яблок осталось?", "Осталось пять яблок."),
        ("कितने सेब बचे हैं?", "पाँच सेब बचे हैं।"),
    ],
)
def test_an_answer_in_the_language_of_the_question_gets_one_and_in_another_zero(question: str, answer: str) -> None:
    assert value(answer, question) == 1.0
    other = "모두 다섯 개입니다." if "apples" in question else "There are five of them."
    assert value(other, question) == 0.0


def test_a_mixed_answer_gets_the_share_of_its_letters() -> None:
    assert value("정답은 five", "몇 개입니까?") == pytest.approx(3 / 7)


def test_chinese_letters_in_a_korean_answer_count_against_it() -> None:
    assert value("결과는 結果", "결과는 무엇입니까?") == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    "answer",
    [
        "답은 \\frac{1}{2} 입니다.",
        "답은 `five_apples` 입니다.",
        "답은\n```python\nprint('five apples')\n```\n입니다.",
        "답은\n```python\nprint('never closed')",
        "답은 12.5 입니다.",
        "답은 x + 2y = π, n은 𝑛, ℝ 입니다.",
        "답은 x는 3 입니다. https://example.org/five",
    ],
)
def test_code_numbers_links_latex_and_variables_do_not_count(answer: str) -> None:
    assert value(answer, "답은 무엇입니까?") == 1.0


def test_the_thinking_counts_only_where_the_whole_completion_is_judged() -> None:
    completion = "<think>\nlet us add them\n</think>\n\n모두 다섯 개입니다."
    assert value(completion, "모두 몇 개입니까?") == 1.0
    assert value(completion, "모두 몇 개입니까?", scope="completion") == pytest.approx(8 / 20)


def test_a_named_language_overrules_the_question() -> None:
    assert value("모두 다섯 개입니다.", "How many are there?", language="korean") == 1.0
    assert value("모두 다섯 개입니다.", "몇 개입니까?", language="english") == 0.0


def test_the_last_user_turn_decides() -> None:
    turns = [("user", "How many?"), ("assistant", "Five of them."), ("user", "한국어로 답하세요")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert language_consistency(RewardInput.of("다섯", messages=messages)) == Score(1.0, "2 of 2 letters are hangul")


@pytest.mark.parametrize(
    ("completion", "question", "reason"),
    [
        ("12", "더하면?", "no letters in the answer"),
        ("", "더하면?", "no letters in the answer"),
        ("twelve", "5+7=?", "no letters in the user's turn"),
    ],
)
def test_without_letters_it_abstains_or_gives_the_value_that_was_set(
    completion: str, question: str, reason: str
) -> None:
    assert judged(completion, question) == Abstain(reason)
    assert judged(completion, question, without_letters=1.0) == Score(1.0, reason)


def test_unknown_parameters_are_errors_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"language = klingon: must be null or one of arabic, chinese"):
        judged("x", "y", language="klingon")
    with pytest.raises(ValueError, match=r"scope = everything: must be final or completion"):
        judged("x", "y", scope="everything")


def test_every_language_has_scripts() -> None:
    assert all(LANGUAGES.values())
