"""repetition, overlong, counting, ocr_anls, chart_relaxed, grounding_iou, multiple_choice and science."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from rewards.chart import chart_relaxed
from rewards.counting import counting
from rewards.grounding import grounding_iou
from rewards.multiple_choice import multiple_choice
from rewards.ocr import edit_distance, ocr_anls
from rewards.overlong import overlong
from rewards.registry import Abstain, RewardInput, Score, lookup
from rewards.repetition import repetition
from rewards.science import science
from rlhf.errors import DataError


def sample(text: str, answer: str = "", **metadata: Any) -> RewardInput:
    return RewardInput.of(text, answer, metadata=metadata)


# --- overlong and repetition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (500, -1.0)])
def test_overlong_falls_over_the_last_tokens_before_the_limit(tokens: int, value: float) -> None:
    judged = lookup("overlong").judge(
        RewardInput.of("x", completion_tokens=tokens), {"max_tokens": 100, "cache_tokens": 20}
    )
    assert isinstance(judged, Score)
    assert judged.value == pytest.approx(value)


def test_overlong_gives_a_truncated_completion_the_full_penalty() -> None:
    assert overlong(RewardInput.of("x", completion_tokens=3, truncated=True), 100, 20).value == -1.0


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_overlong_refuses_impossible_limits(cache: int) -> None:
    with pytest.raises(ValueError, match=f"cache_tokens = {cache}: must be above 0"):
        overlong(sample("x"), 100, cache)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a b c d e f", 0.0),
        ("a b a b a b", -0.6),
        ("A B a b", -1 / 3),
        ("one", 0.0),
        ("", 0.0),
        ("가나 다라 가나 다라", -1 / 3),
        ("猫猫猫", -0.5),
    ],
)
def test_repetition_is_the_share_of_ngrams_seen_before(text: str, value: float) -> None:
    assert repetition(sample(text), ngram=2).value == pytest.approx(value)


def test_repetition_up_to_the_free_share_costs_nothing() -> None:
    assert repetition(sample("a b a b a b"), ngram=2, free_share=0.6).value == pytest.approx(0.0)
    assert repetition(sample("a b a b a b"), ngram=2, free_share=0.2).value == pytest.approx(-0.5)
    assert repetition(sample("a b a b a b"), ngram=2).parts == {"repeated_share": pytest.approx(0.6)}


def test_repetition_looks_at_the_thinking_unless_told_otherwise() -> None:
    text = "<think>so so so so</think>done"
    assert repetition(sample(text), ngram=1).value < 0
    assert repetition(sample(text), ngram=1, scope="final").value == 0.0


def test_repetition_of_a_long_text_is_fast_and_in_range() -> None:
    started = time.monotonic()
    judged = lookup("repetition").judge(sample("wait " * 50_000), {})
    assert isinstance(judged, Score)
    assert -1.0 <= judged.value < -0.99
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("params", [{"ngram": 0}, {"free_share": 1.0}, {"free_share": -0.1}, {"scope": "all"}])
def test_repetition_refuses_impossible_parameters(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Correct rewards\.components\.repetition\.params"):
        repetition(sample("x"), **params)


# --- multiple choice --------------------------------------------------------------------------------------------------

FRUIT = {"options": ["apple", "pear", "A fig", "plum"]}


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{B}",
        r"\boxed{\text{(b)}}",
        "The answer is B.",
        "Answer: (B) pear",
        "**B**",
        "b",
        "So it is:\nB. pear",
        "The answer is pear.",
        "The answer is B because C is too sweet.",
        "정답은 B입니다.",
        "A pear is green.\nThe answer is B",
        "The answer is: **B**",
        "La respuesta es B",
    ],
)
def test_the_right_letter_is_found(text: str) -> None:
    assert multiple_choice(sample(text, "B", **FRUIT)).value == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "C",
        "A or B",
        "The answer is A. The answer is B.",
        r"\boxed{A} \boxed{B}",
        r"\boxed{A, B}",
        "A B C D",
        "It could be B.\nHard to say",
        "The answer is A pear",
        "(A) or (B)",
        "E",
        "apple and pear",
    ],
)
def test_other_letters_two_letters_and_none_are_wrong(text: str) -> None:
    assert multiple_choice(sample(text, "B", **FRUIT)).value == 0.0


def test_options_may_be_an_object_and_the_answer_a_text() -> None:
    options = {"options": {"a": "yes", "b": "no", "c": None}}
    assert multiple_choice(sample("(B)", "No.", **options)).value == 1.0
    assert multiple_choice(sample("(C)", "no", **options)).value == 0.0


@pytest.mark.parametrize(
    ("answer", "metadata"),
    [("B", {}), ("B", {"options": ["one"]}), ("B", {"options": {"AB": "x", "C": "y"}}), ("Z", FRUIT), ("", FRUIT)],
)
def test_a_record_without_options_or_with_another_answer_is_an_error(answer: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        multiple_choice(sample("B", answer, **metadata))


# --- OCR, charts, counting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("가나다", "가다", 1),
        ("a" * 200, "b" * 150, 200),
    ],
)
def test_the_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("HELLO  World", 1.0),
        (r"It reads \boxed{hello world}", 1.0),
        ("hello w0rld", 1 - 1 / 11),
        ("hell", 0.0),
        ("", 0.0),
        ("hello world " * 5, 0.0),
        ("ｈｅｌｌｏ world", 1.0),
    ],
)
def test_ocr_is_one_minus_the_normalised_distance_down_to_the_threshold(text: str, value: float) -> None:
    assert ocr_anls(sample(text, "hello world")).value == pytest.approx(value)


def test_ocr_takes_the_nearest_of_several_references_and_refuses_none() -> None:
    assert ocr_anls(sample("two", answers=["one", "two"])).value == 1.0
    for metadata in ({"answers": []}, {"answers": "two"}, {"answers": [""]}, {}):
        with pytest.raises(DataError, match="must be texts that are not empty"):
            ocr_anls(sample("two", **metadata))


@pytest.mark.parametrize(
    ("answer", "text", "metadata", "value"),
    [
        ("200", "The answer is 209.", {}, 1.0),
        ("200", "The answer is 211.", {}, 0.0),
        ("200", "-200", {}, 0.0),
        ("0", "0.001", {}, 0.0),
        ("2019", "2100", {}, 0.0),
        ("2019", "2019", {}, 1.0),
        ("2019", "2100", {"answer_type": "number"}, 1.0),
        ("200", "201", {"answer_type": "integer"}, 0.0),
        ("200", "200.0", {"answer_type": "integer"}, 1.0),
        ("1990", "about 1991", {"answer_type": "year"}, 0.0),
        ("15%", "0.15", {}, 1.0),
        ("15", "15%", {}, 1.0),
        ("200", "200 or 300", {}, 0.0),
        ("200", "inf", {}, 0.0),
        ("South Korea", r"\boxed{south  korea}", {}, 1.0),
        ("South Korea", "North Korea", {}, 0.0),
        ("12", "12", {"answer_type": "text"}, 1.0),
        ("200", "", {}, 0.0),
    ],
)
def test_charts_have_a_tolerance_where_one_makes_sense(
    answer: str, text: str, metadata: dict[str, Any], value: float
) -> None:
    assert chart_relaxed(sample(text, answer, **metadata)).value == value


def test_a_chart_record_with_an_unknown_type_or_no_answer_is_an_error() -> None:
    for answer, metadata in (("", {}), ("x", {"answer_type": "year"}), ("1", {"answer_type": "colour"})):
        with pytest.raises(DataError):
            chart_relaxed(sample("1", answer, **metadata))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 1.0),
        ("There are three dogs.", 1.0),
        (r"\boxed{3}", 1.0),
        ("2 cats. 1 dog. The answer is 3.", 1.0),
        ("3.0", 1.0),
        ("4", 0.0),
        ("3 or 4", 0.0),
        ("2 3 4", 0.0),
        ("", 0.0),
        ("many", 0.0),
        ("-3", 0.0),
        ("3.5", 0.0),
    ],
)
def test_counting_wants_exactly_one_right_number(text: str, value: float) -> None:
    assert counting(sample(text, "3")).value == value


@pytest.mark.parametrize("answer", ["", "three", "-1", "2.5"])
def test_a_counting_record_without_a_whole_number_is_an_error(answer: str) -> None:
    with pytest.raises(DataError, match="must be a whole number"):
        counting(sample("3", answer))


# --- grounding --------------------------------------------------------------------------------------------------------

IMAGE = {"box": [10, 10, 30, 30], "coordinates": "pixels", "width": 100, "height": 50}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[10, 10, 30, 30]", 1.0),
        ('{"bbox_2d": [10.0, 10, 30, 30], "label": "cat"}', 1.0),
        ("(10,10),(30,30)", 1.0),
        ("[20, 10, 40, 30]", 1 / 3),
        ("[40, 10, 60, 30]", 0.0),
        ("[30, 30, 10, 10]", 0.0),
        ("[10, 10, 10, 30]", 0.0),
        ("[10, 10, 30, 51]", 0.0),
        ("[-1, 10, 30, 30]", 0.0),
        ("[10, 10, nan, 30]", 0.0),
        ("[10, 10, inf, 30]", 0.0),
        ("[10, 10, 1e400, 30]", 0.0),
        ("[10, 10, 30, 30] or [0, 0, 100, 50]", 0.0),
        ("[10, 10, 30]", 0.0),
        ("[10, 10, 30, 30, 40]", 0.0),
        ("", 0.0),
    ],
)
def test_grounding_is_the_overlap_of_the_one_valid_box(text: str, value: float) -> None:
    judged = lookup("grounding_iou").judge(sample(text, **IMAGE), {})
    assert isinstance(judged, Score)
    assert judged.value == pytest.approx(value)


def test_grounding_with_a_threshold_is_one_or_zero_and_keeps_the_number() -> None:
    score = grounding_iou(sample("[20, 10, 40, 30]", **IMAGE), threshold=0.3)
    assert (score.value, score.parts) == (1.0, {"iou": pytest.approx(1 / 3)})
    assert grounding_iou(sample("[20, 10, 40, 30]", **IMAGE), threshold=0.5).value == 0.0


@pytest.mark.parametrize(("space", "box"), [("unit", [0.1, 0.1, 0.5, 0.5]), ("thousandths", [100, 100, 500, 500])])
def test_grounding_in_other_spaces_needs_no_image_size(space: str, box: list[float]) -> None:
    assert grounding_iou(sample(str(box), box=box, coordinates=space)).value == 1.0
    assert grounding_iou(sample("[1, 1, 2000, 2000]", box=box, coordinates=space)).value == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"coordinates": None},
        {"coordinates": "percent"},
        {"width": None},
        {"height": 0},
        {"box": None},
        {"box": [1, 2, 3]},
        {"box": [30, 30, 10, 10]},
        {"box": [0, 0, 101, 10]},
        {"box": ["1", 2, 3, 4]},
    ],
)
def test_a_record_without_a_valid_box_and_space_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        grounding_iou(sample("[10, 10, 30, 30]", **(IMAGE | change)))


# --- science ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[RewardInput]]:
    """Installs a judge that gives one opinion, at `judges_of_test:judge`; returns the samples it is asked about."""

    def install(opinion: Any) -> list[RewardInput]:
        asked: list[RewardInput] = []

        async def judge(seen: RewardInput, scale: float = 1.0) -> Any:
            asked.append(seen)
            return opinion * scale if isinstance(opinion, float) else opinion

        module = ModuleType("judges_of_test")
        module.judge = judge  # type: ignore[attr-defined]
        module.plain = len  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "judges_of_test", module)
        return asked

    return install


def asked_science(text: str, answer: str, judge: str | None = None, **metadata: Any) -> Score | Abstain:
    return asyncio.run(science(sample(text, answer, **metadata), judge))


def test_without_a_judge_the_rule_decides_alone() -> None:
    assert asked_science("The answer is 12.", "12") == Score(1.0, "rule: right (number): 12", {"rule": 1.0})
    wrong = asked_science("The answer is 13.", "12")
    assert isinstance(wrong, Score) and (wrong.value, wrong.parts) == (0.0, {"rule": 0.0})
    assert asked_science("(B)", "B", options=["x", "y"]) == Score(1.0, "rule: right: B", {"rule": 1.0})


def test_the_judge_is_asked_only_about_what_the_rule_calls_wrong(judges: Callable[[Any], list[RewardInput]]) -> None:
    asked = judges(Score(1.0, "the same element", {"confidence": 0.9}))
    asked_science("The answer is gold.", "gold", "judges_of_test:judge")
    asked_science("", "gold", "judges_of_test:judge")
    asked_science("(A)", "B", "judges_of_test:judge", options=["x", "y"])
    assert not asked
    judged = asked_science("The answer is Au.", "gold", "judges_of_test:judge")
    assert len(asked) == 1
    parts = {"rule": 0.0, "judge": 1.0, "confidence": 0.9}
    assert judged == Score(1.0, "judge: the same element", parts)


def test_the_judges_number_abstention_and_parameters_are_passed_on(judges: Callable[[Any], list[RewardInput]]) -> None:
    judges(0.5)
    seen = sample("The answer is Au.", "gold")
    judged = asyncio.run(science(seen, "judges_of_test:judge", {"scale": 0.5}))
    assert isinstance(judged, Score) and judged.value == 0.25
    judges(Abstain("no idea"))
    assert asked_science("Au", "gold", "judges_of_test:judge") == Abstain("no idea")


@pytest.mark.parametrize("path", ["judge", "judges_of_test:nothing", "judges_of_test:plain", ":judge"])
def test_a_judge_that_is_no_async_function_is_an_error(path: str, judges: Callable[[Any], list[RewardInput]]) -> None:
    judges(1.0)
    with pytest.raises(ValueError, match=r"Correct rewards\.components\.science\.params\.judge"):
        asked_science("Au", "gold", path)


@pytest.mark.parametrize(
    "text", ["[" + "1" * 50_000, "[1," * 20_000, r"\boxed{" * 10_000, "1 " * 30_000, "A " * 30_000, "1" * 50_000]
)
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    grounding_iou(sample(text, **IMAGE))
    counting(sample(text, "3"))
    chart_relaxed(sample(text, "3"))
    multiple_choice(sample(text, "B", **FRUIT))
    ocr_anls(sample(text, "hello world"))
    repetition(sample(text))
    assert time.process_time() - started < 5.0
