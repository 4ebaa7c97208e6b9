"""`instruction_following`: 1.0 when the final answer follows every instruction of its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rewards.instruction.registry import Instruction, find
from rewards.instruction.response import Response, loose_variants, visible
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError

_Constraint = tuple[Instruction, dict[str, Any]]


@reward("instruction_following")
def instruction_following(sample: RewardInput, mode: Literal["strict", "loose"] = "strict") -> Score:
    """1.0 or 0.0 with the first broken instruction as the reason.

    Parts: the result of each instruction under its id (`#2` after the second of the same id) and `satisfied_fraction`.
    The record says `metadata.instruction_id_list` and `metadata.kwargs`, as IFEval does. Judged is what a reader sees
    of the text after the thinking; without a letter or digit in it every instruction is broken. `loose`: each
    instruction may hold in any of IFEval's eight variants of the text (without the first or last line, without
    asterisks). Raises DataError for a record that cannot be judged.
    """
    if mode not in ("strict", "loose"):
        raise ValueError(f"mode = {mode!r}: must be strict or loose. Correct the params of instruction_following")
    constraints = constraints_of(sample.metadata)
    text = visible(sample.final)
    responses = _responses(sample, constraints, loose_variants(text) if mode == "loose" else (text,))
    broken = [_broken(constraint, responses) for constraint in constraints]
    parts = dict(zip(_part_names(constraints), (float(not fault) for fault in broken), strict=True))
    fraction = sum(parts.values()) / len(parts)
    first = next((f"{name}: {fault}" for name, fault in zip(parts, broken, strict=True) if fault), "")
    reason = first or f"{len(parts)} instructions followed"
    return Score(float(not first), reason, parts | {"satisfied_fraction": fraction})


def constraints_of(metadata: Mapping[str, Any]) -> list[_Constraint]:
    """The record's instructions with their checked arguments. Raises DataError naming the field and the rule."""
    names, arguments = _list(metadata, "instruction_id_list"), _list(metadata, "kwargs")
    if len(names) != len(arguments):
        raise DataError(
            f"metadata.kwargs has {len(arguments)} entries: must have one for each of the {len(names)} ids of "
            "metadata.instruction_id_list. They belong together. Fix or drop the record."
        )
    constraints: list[_Constraint] = []
    for row, (name, raw) in enumerate(zip(names, arguments, strict=True)):
        item = find(name, f"metadata.instruction_id_list[{row}]")
        constraints.append((item, item.arguments(_object(raw, row), f"metadata.kwargs[{row}]")))
    return constraints


def _list(metadata: Mapping[str, Any], field: str) -> list[Any] | tuple[Any, ...]:
    value = metadata.get(field)
    if not isinstance(value, list | tuple) or not value:
        kind = "missing" if value is None else repr(value)[:80]
        raise DataError(
            f"metadata.{field} = {kind}: must be a list that is not empty. instruction_following reads it. "
            f"Name the column {field} among the metadata columns of the data, or route the record to another reward."
        )
    return value


def _object(value: Any, row: int) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(
            f"metadata.kwargs[{row}] = {value!r}: must be an object. Its keys are arguments. Fix the record."
        )
    return value


def _responses(sample: RewardInput, constraints: list[_Constraint], texts: Any) -> list[Response]:
    """The texts that may be judged; one that is empty proves nothing and is left out."""
    turns = [message.get("content", "") for message in sample.messages if message.get("role") == "user"]
    repeated = next((a["prompt_to_repeat"] for _, a in constraints if "prompt_to_repeat" in a), "")
    responses = [Response.of(text, turns[-1] if turns else "", repeated) for text in dict.fromkeys(texts)]
    return [response for response in responses if not response.empty]


def _broken(constraint: _Constraint, responses: list[Response]) -> str:
    """How the instruction is broken in the first of `responses`; "" when any of them follows it."""
    item, arguments = constraint
    if not responses:
        item.broken(Response("x", "x"), arguments)  # a record that cannot be judged is an error for an empty answer too
        return "no visible text"
    faults = [item.broken(response, arguments) for response in responses]
    return "" if "" in faults else faults[0]


def _part_names(constraints: list[_Constraint]) -> list[str]:
    names: list[str] = []
    for item, _ in constraints:
        repeats = sum(name.partition("#")[0] == item.id for name in names)
        names.append(f"{item.id}#{repeats + 1}" if repeats else item.id)
    return names
