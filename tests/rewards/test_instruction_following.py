"""The reward over a record: all instructions must hold, bad records are errors, hidden text does not count."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rewards.instruction import Response, Verdict, instruction, instruction_following
from rewards.instruction import registry as instructions
from rewards.instruction.languages import _detector, fault
from rewards.instruction.reward import constraints_of
from rewards.registry import RewardInput, Score
from rlhf.errors import ConfigError, DataError


def score(text: str, *constraints: tuple[str, dict[str, Any]], mode: Any = "strict", request: str = "") -> Score:
    metadata = {"instruction_id_list": [c[0] for c in constraints], "kwargs": [c[1] for c in constraints]}
    messages = [{"role": "user", "content": request}] if request else []
    return instruction_following(RewardInput.of(text, metadata=metadata, messages=messages), mode)


NO_COMMA: tuple[str, dict[str, Any]] = ("punctuation:no_comma", {})
SHORT = ("length_constraints:number_words", {"relation": "less than", "num_words": 5})
END = ("startend:end_checker", {"end_phrase": "The end."})


def test_the_reward_is_one_only_when_all_instructions_hold() -> None:
    result = score("Short and sweet", NO_COMMA, SHORT)
    assert result.value == 1.0
    assert result.parts == {NO_COMMA[0]: 1.0, SHORT[0]: 1.0, "satisfied_fraction": 1.0}


def test_the_first_broken_instruction_is_the_reason() -> None:
    result = score("one, two three four five", NO_COMMA, SHORT, SHORT)
    assert result.value == 0.0
    assert result.reason == "punctuation:no_comma: ',' is in the text"
    assert result.parts == {NO_COMMA[0]: 0.0, SHORT[0]: 0.0, f"{SHORT[0]}#2": 0.0, "satisfied_fraction": 0.0}


@pytest.mark.parametrize(
    "text", ["", "   ", "\u200b\u2060", "<!-- a fine answer -->", "\u3164\u2800", "***", "[//]: # (hidden)"]
)
def test_a_text_without_anything_to_see_breaks_every_instruction(text: str) -> None:
    result = score(text, NO_COMMA, SHORT)
    assert (result.value, result.reason) == (0.0, "punctuation:no_comma: no visible text")


def test_only_the_text_after_the_thinking_is_judged() -> None:
    assert score("<think>a, b, c, d, e, f</think>fine", NO_COMMA, SHORT).value == 1.0
    assert score("<think>fine", NO_COMMA).value == 0.0


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("Sure, here you go:\nA poem", NO_COMMA),
        ("A poem\nHope you like it, bye", NO_COMMA),
        ("Sure, yes\nA poem\nBye, all", NO_COMMA),
        ("A story. **The end.**", END),
        ("Sure:\nA story. *The end.*\nBye", END),
    ],
)
def test_loose_mode_forgives_a_first_line_a_last_line_and_asterisks(text: str, constraint: tuple[str, Any]) -> None:
    assert score(text, constraint).value == 0.0
    assert score(text, constraint, mode="loose").value == 1.0


def test_loose_mode_does_not_pass_on_the_empty_rest_of_a_short_text() -> None:
    assert score("One, two", NO_COMMA, mode="loose").value == 0.0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "metadata.instruction_id_list = missing: must be a list"),
        ({"instruction_id_list": [], "kwargs": []}, "must be a list that is not empty"),
        ({"instruction_id_list": [NO_COMMA[0]], "kwargs": [{}, {}]}, "has 2 entries: must have one for each of the 1"),
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "Did you mean punctuation:no_comma"),
        ({"instruction_id_list": [3], "kwargs": [{}]}, r"instruction_id_list\[0\] = 3: must be a registered"),
        ({"instruction_id_list": [NO_COMMA[0]], "kwargs": ["x"]}, r"kwargs\[0\] = 'x': must be an object"),
        ({"instruction_id_list": [NO_COMMA[0]], "kwargs": [{"n": 1}]}, r"kwargs\[0\].n: must be an argument of"),
        ({"instruction_id_list": [SHORT[0]], "kwargs": [{"num_words": 3}]}, r"kwargs\[0\].relation: must be given"),
        (
            {"instruction_id_list": [SHORT[0]], "kwargs": [{"relation": "at most", "num_words": 3}]},
            r"kwargs\[0\].relation = 'at most': must be one of 'at least', 'less than'",
        ),
        ({"instruction_id_list": [SHORT[0]], "kwargs": [SHORT[1] | {"num_words": "3"}]}, "must be an integer"),
        ({"instruction_id_list": [SHORT[0]], "kwargs": [SHORT[1] | {"num_words": -1}]}, "= -1: must be an integer"),
        ({"instruction_id_list": [SHORT[0]], "kwargs": [SHORT[1] | {"num_words": True}]}, "must be an integer"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": [""]}]}, "must be a list of texts"),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]}, "must be one of"),
        (
            {"instruction_id_list": ["length_constraints:nth_paragraph_first_word"],
             "kwargs": [{"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}]},
            "nth_paragraph = 3: must be from 1 to num_paragraphs = 2",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("completion", ["some answer", ""])
def test_a_record_that_cannot_be_judged_is_an_error_that_names_the_field(
    metadata: dict[str, Any], message: str, completion: str
) -> None:
    with pytest.raises(DataError, match=message):
        instruction_following(RewardInput.of(completion, metadata=metadata))


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="mode = 'lose': must be strict or loose"):
        score("x", NO_COMMA, mode="lose")


def test_nulls_and_floats_of_data_frames_are_accepted() -> None:
    kwargs = {"relation": "less than", "num_words": 5.0, "keywords": None, "language": None}
    assert score("Short and sweet", (SHORT[0], kwargs)).value == 1.0


def test_an_instruction_of_ones_own_is_checked_like_the_built_in_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "_REGISTERED", dict(instructions._REGISTERED))

    @instruction("test:lines")
    def lines(response: Response, count: int = 3) -> Verdict:
        found = len(response.text.splitlines())
        return found == count or f"{found} lines, {count} wanted"

    assert score("a\nb\nc", ("test:lines", {})).value == 1.0
    assert score("a\nb\nc", ("test:lines", {"count": 2})).reason == "test:lines: 3 lines, 2 wanted"
    with pytest.raises(DataError, match=r"kwargs\[0\].count = 'x': must be an integer"):
        score("a", ("test:lines", {"count": "x"}))
    with pytest.raises(ConfigError, match="can be registered once"):
        instruction("test:lines")(lines)


def test_a_checker_that_returns_nonsense_is_an_error_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "_REGISTERED", dict(instructions._REGISTERED))
    instruction("test:nothing")(lambda response: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="'test:nothing' returned None: must be True, False or a text"):
        score("a", ("test:nothing", {}))


def test_a_missing_language_detector_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lingua", None)
    _detector.cache_clear()
    with pytest.raises(ImportError, match="pip install lingua-language-detector"):
        fault("Ein Satz, der lang genug ist, um ihn zu erkennen.", "de")
    assert fault("오늘은 날씨가 좋습니다", "ko") == ""  # needs no detector


def test_every_record_of_ifeval_is_accepted_and_no_honest_text_raises() -> None:
    records = ifeval_records()
    assert len(records) == 541
    seen: Counter[str] = Counter()
    for record in records:
        seen.update(item.id for item, _ in constraints_of(record))
        messages = [{"role": "user", "content": record["prompt"]}]
        copied = instruction_following(RewardInput.of(record["prompt"], metadata=record, messages=messages))
        assert copied.value in (0.0, 1.0)
    assert len(seen) == 25
    assert seen.total() == 834


def ifeval_records() -> list[dict[str, Any]]:
    folder = os.environ.get("GROUPWISE_TEST_DATA")
    path = Path(folder or ".") / "ifeval_prompts.jsonl"
    if folder is None or not path.exists():
        pytest.skip("set GROUPWISE_TEST_DATA to a folder with ifeval_prompts.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]
