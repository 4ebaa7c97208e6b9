"""The built-in reward `format`: does the completion have the shape a reader, or a program, can use?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.answers import last_boxed
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError
from rlhf.thinking import THINK_CLOSE, THINK_OPEN

SPECIAL_MARKUP = re.compile(
    r"</?think>|</?tool_call>|<\|[^|<>\n]{1,40}\|>|\[\|[^|\[\]\n]{1,40}\|\]"
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)
EMPTY_THINKING = re.compile(r"\A\s*<think>\s*</think>")
TOOL_CALL = re.compile(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", re.DOTALL)
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)

Schema = Mapping[str, Any]


@reward("format")
def format_reward(sample: RewardInput, require: Sequence[str] = (), json_schema: Schema | None = None) -> Score:
    """1.0 for a complete, clean answer, else 0.0 with the first rule it breaks as the reason.

    The rules: not truncated; in reasoning mode exactly one `</think>` closes the thinking, otherwise there is no
    thinking (an empty block is the template's own); the final answer is not empty; it has no chat-template markup.

    `require` names more of them, each with a part of its own beside the part `clean`: `boxed`: a box that is not empty;
    `json`: all of the final answer, perhaps in a code fence, is JSON that fits `json_schema`, or else
    `metadata.json_schema`, or any JSON object or array; `tool_call`: one or more `<tool_call>{"name", "arguments"}
    </tool_call>`, each a tool of `metadata.tools` with arguments that fit its parameters, and no other markup.
    ValueError for an unknown requirement, DataError for a record without usable tools or schema.
    """
    _check_requirements(require)
    broken = {"clean": _truncation(sample) or _thinking(sample) or _final(sample.final, "tool_call" in require)}
    checks: dict[str, Callable[[], str]] = {
        "boxed": lambda: "" if last_boxed(sample.final) else "no box with an answer in it",
        "json": lambda: _json(sample, json_schema),
        "tool_call": lambda: _tool_calls(sample),
    }
    broken |= {name: checks[name]() for name in require}
    problem = next((fault for fault in broken.values() if fault), "")
    parts = {name: float(not fault) for name, fault in broken.items()} if require else {}
    return Score(float(not problem), problem or "well formed", parts)


def _check_requirements(require: Sequence[str]) -> None:
    known = ("boxed", "json", "tool_call")
    if isinstance(require, str) or not all(name in known for name in require):
        raise ValueError(f"require = {require!r}: must be a list of {', '.join(known)}. Correct the params of format")


# --- complete and clean -----------------------------------------------------------------------------------------------


def _truncation(sample: RewardInput) -> str:
    return "truncated at the token limit" if sample.truncated else ""


def _thinking(sample: RewardInput) -> str:
    if not sample.reasoning_mode:
        return "thinking outside reasoning mode" if THINK_CLOSE in _without_empty_block(sample.completion) else ""
    closed, opened = sample.completion.count(THINK_CLOSE), sample.completion.count(THINK_OPEN)
    if closed != 1:
        return f"{closed} {THINK_CLOSE} in reasoning mode, expected exactly 1"
    return f"{opened} {THINK_OPEN} in reasoning mode, expected at most 1" if opened > 1 else ""


def _without_empty_block(completion: str) -> str:
    return EMPTY_THINKING.sub("", completion)


def _final(final: str, with_tool_calls: bool) -> str:
    if not final.strip():
        return "no final answer"
    markup = SPECIAL_MARKUP.search(TOOL_CALL.sub("", final) if with_tool_calls else final)
    return f"chat-template markup {markup.group()!r} in the final answer" if markup else ""


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json(sample: RewardInput, json_schema: Schema | None) -> str:
    schema = sample.metadata.get("json_schema") if json_schema is None else json_schema
    key = "metadata.json_schema" if json_schema is None else "rewards.components.format.params.json_schema"
    fits = _validator({"type": ["object", "array"]} if schema is None else schema, key)
    fenced = FENCE.fullmatch(sample.final.strip())
    try:
        value = _strict_json(fenced.group(1) if fenced else sample.final)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return fits(value)


def _strict_json(text: str) -> Any:
    """The value of one JSON text. ValueError for NaN, Infinity and a key that occurs twice too, RecursionError."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _validator(schema: Any, key: str) -> Callable[[Any], str]:
    """What says how a value breaks the schema, "" when it fits. DataError when the schema is none.

    References are resolved inside the schema only, nothing is fetched.
    """
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if not isinstance(schema, Mapping):
        raise DataError(
            f"{key} = {schema!r}: must be a JSON schema, an object. Answers are checked with it. Correct it."
        )
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise DataError(f"{key}: must be a valid JSON schema. {error.message}. Correct it.") from error
    validator = kind(schema, registry=Registry())

    def fault(value: Any) -> str:
        error = next(iter(validator.iter_errors(value)), None)
        return "" if error is None else f"{error.json_path}: {error.message}"[:200]

    return fault


# --- tool calls -------------------------------------------------------------------------------------------------------


def _tool_calls(sample: RewardInput) -> str:
    tools = _tools(sample.metadata)
    calls = TOOL_CALL.findall(sample.final)
    if not calls:
        return "no complete <tool_call>"
    return next((fault for call in calls if (fault := _call_fault(call, tools))), "")


def _call_fault(text: str, tools: Mapping[str, Callable[[Any], str]]) -> str:
    try:
        call = _strict_json(text)
    except (ValueError, RecursionError) as error:
        return f"tool call is not JSON: {error}"
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return 'tool call must be {"name": ..., "arguments": {...}} and nothing else'
    if not isinstance(call["name"], str) or call["name"] not in tools:
        return f"no tool {call['name']!r}"
    fault = tools[call["name"]](call["arguments"])
    return f"arguments of {call['name']}: {fault}" if fault else ""


def _tools(metadata: Mapping[str, Any]) -> dict[str, Callable[[Any], str]]:
    """Tool name -> what checks its arguments, from OpenAI's form or its bare `function` objects."""
    given = metadata.get("tools")
    functions = (
        [t.get("function", t) if isinstance(t, Mapping) else t for t in given] if isinstance(given, list) else []
    )
    if not functions or not all(isinstance(f, Mapping) and isinstance(f.get("name"), str) for f in functions):
        raise DataError(
            f"metadata.tools = {given!r}: must be a list of tools with a name and parameters. Calls are checked with "
            "them. Fix the record or name the metadata column tools."
        )
    return {f["name"]: _validator(_closed(f.get("parameters") or {}), f"metadata.tools.{f['name']}") for f in functions}


def _closed(parameters: Any) -> Any:
    """The schema of the arguments, in which an argument that is not listed is wrong unless the schema allows it."""
    if not isinstance(parameters, Mapping):
        return parameters
    return {"type": "object", "properties": {}, "additionalProperties": False, **parameters}
