"""The shape of a completion: thinking closed once, an answer, no template markup, not truncated."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rewards.format import format_reward
from rewards.registry import RewardInput, Score
from rlhf.errors import DataError


@pytest.mark.parametrize(
    ("completion", "reasoning_mode"),
    [
        ("<think>\n5 + 7\n</think>\n\n12", True),
        ("5 + 7</think>12", True),
        ("12", False),
        ("<think>\n\n</think>\n\n12", False),
        ("a < b, [1, 2], |x| and <b>bold</b>", False),
    ],
)
def test_well_formed_completions_get_one(completion: str, reasoning_mode: bool) -> None:
    assert format_reward(RewardInput.of(completion, reasoning_mode=reasoning_mode)).value == 1.0


@pytest.mark.parametrize(
    ("completion", "reasoning_mode", "reason"),
    [
        ("<think>never closed 12", True, "0 </think>"),
        ("12", True, "0 </think>"),
        ("<think>a</think>b</think>12", True, "2 </think>"),
        ("<think>a<think>b</think>12", True, "2 <think>"),
        ("<think>a</think>  ", True, "no final answer"),
        ("", False, "no final answer"),
        ("<think>thought</think>12", False, "thinking outside reasoning mode"),
        ("<think>a</think>12[|endofturn|]", True, "markup '[|endofturn|]'"),
        ("<think>a</think>12<|im_end|>", True, "markup '<|im_end|>'"),
        ("12</s>", False, "markup '</s>'"),
        ("12 <tool_call>", False, "markup"),
        ("12\n<start_of_turn>user", False, "markup"),
    ],
)
def test_malformed_completions_get_zero_with_the_reason(completion: str, reasoning_mode: bool, reason: str) -> None:
    score = format_reward(RewardInput.of(completion, reasoning_mode=reasoning_mode))
    assert score.value == 0.0
    assert reason in score.reason


def test_a_truncated_completion_gets_zero() -> None:
    assert format_reward(RewardInput.of("12", truncated=True)).value == 0.0


def require(text: str, name: str, metadata: dict[str, Any] | None = None, **params: Any) -> Score:
    return format_reward(RewardInput.of(text, metadata=metadata or {}), require=[name], **params)


def test_without_requirements_there_are_no_parts() -> None:
    assert format_reward(RewardInput.of("12")) == Score(1.0, "well formed")


@pytest.mark.parametrize(
    ("text", "value"), [(r"so \boxed{12}", 1.0), ("12", 0.0), (r"\boxed{}", 0.0), (r"\boxed{12", 0.0)]
)
def test_a_box_can_be_required(text: str, value: float) -> None:
    score = require(text, "boxed")
    assert (score.value, score.parts) == (value, {"clean": 1.0, "boxed": value})


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"n": 3}', ""),
        ('```json\n{"n": 3}\n```', ""),
        ('{"n": 0}', "$.n: 0 is less than the minimum of 1"),
        ('{"n": "3"}', "$.n"),
        ("{}", "'n' is a required property"),
        ('Here: {"n": 3}', "not JSON"),
        ('{"n": 0, "n": 3}', "a key occurs twice"),
        ('{"n": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "is not of type 'object'"),
    ],
)
def test_json_must_fit_the_schema_of_the_params_or_the_record(text: str, reason: str) -> None:
    for score in (require(text, "json", json_schema=SCHEMA), require(text, "json", {"json_schema": SCHEMA})):
        assert score.value == float(not reason)
        assert (reason or "well formed") in score.reason


def test_without_a_schema_any_json_object_will_do() -> None:
    assert require('{"a": []}', "json").value == 1.0
    assert require('"text"', "json").value == 0.0


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, "{}", []])
def test_a_schema_that_is_none_is_an_error(schema: Any) -> None:
    with pytest.raises(DataError, match=r"metadata\.json_schema"):
        require("{}", "json", {"json_schema": schema})


def test_a_schema_never_fetches_anything() -> None:
    with pytest.raises(Exception, match=r"Unresolvable|localhost"):
        require("{}", "json", json_schema={"$ref": "http://localhost:9/schema.json"})


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}, {"name": "now"}]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "weather", "arguments": {"city": "서울"}}</tool_call>', ""),
        ('Sure.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', ""),
        ('<tool_call>{"name": "now", "arguments": {}}</tool_call>' * 2, ""),
        ("It rains.", "no complete <tool_call>"),
        ('<tool_call>{"name": "now", "arguments": {}}', "markup '<tool_call>'"),
        ('<tool_call>{"name": "now", "arguments": {}}</tool_call><tool_call>', "markup '<tool_call>'"),
        ("<tool_call>now()</tool_call>", "tool call is not JSON"),
        ('<tool_call>{"name": "rain", "arguments": {}}</tool_call>', "no tool 'rain'"),
        ('<tool_call>{"name": [], "arguments": {}}</tool_call>', "no tool []"),
        ('<tool_call>{"name": "weather", "arguments": {}}</tool_call>', "'city' is a required property"),
        ('<tool_call>{"name": "weather", "arguments": {"city": 3}}</tool_call>', "$.city"),
        ('<tool_call>{"name": "now", "arguments": {"zone": "KST"}}</tool_call>', "'zone' was unexpected"),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "and nothing else"),
        ('<tool_call>{"name": "now", "arguments": {}, "id": 1}</tool_call>', "and nothing else"),
    ],
)
def test_a_tool_call_must_fit_the_tools_of_the_record(text: str, reason: str) -> None:
    score = require(text, "tool_call", TOOLS)
    assert score.value == float(not reason)
    assert (reason or "well formed") in score.reason


@pytest.mark.parametrize("metadata", [{}, {"tools": []}, {"tools": ["now"]}, {"tools": [{"function": {}}]}])
def test_a_record_without_usable_tools_is_an_error(metadata: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"metadata\.tools"):
        require("x", "tool_call", metadata)


@pytest.mark.parametrize("names", ["boxed", ["xml"]])
def test_an_unknown_requirement_is_an_error(names: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of boxed, json, tool_call"):
        format_reward(RewardInput.of("x"), require=names)


@pytest.mark.parametrize("text", ["<tool_call>" * 10_000, "```json\n" + "\n  " * 20_000, "[|" * 30_000])
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    assert require(text, "tool_call", TOOLS).value == require(text, "json").value == 0.0
    assert time.process_time() - started < 5.0
