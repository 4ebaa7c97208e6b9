"""`@instruction("group:name")`: kinds of constraint, and the check of a record's arguments against their signatures.

A checker takes a `Response` and the record's keyword arguments. Their annotations are the rule for the record: `int`
(0 or more), `str` (not empty), `list[str]` (not empty), `Literal[...]`; anything else is passed on unchecked.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rewards.instruction.response import Response
from rlhf.errors import ConfigError, DataError, did_you_mean

Verdict = bool | str
"""True: the response follows the instruction. False, or a text that says how: it does not."""

_FIX = "Fix or drop the record."


@dataclass(frozen=True, slots=True)
class Instruction:
    """A registered kind of constraint; `rules` has the annotation of each keyword argument."""

    id: str
    check: Callable[..., Verdict]
    rules: Mapping[str, Any]
    required: frozenset[str]
    location: str

    def broken(self, response: Response, arguments: Mapping[str, Any]) -> str:
        """How `response` breaks the instruction, "" when it follows. TypeError when the checker returns neither."""
        verdict = self.check(response, **arguments)
        if verdict is True:
            return ""
        if verdict is False or (isinstance(verdict, str) and verdict):
            return verdict or "not followed"
        raise TypeError(f"instruction {self.id!r} returned {verdict!r}: must be True, False or a text. {self.location}")

    def arguments(self, raw: Mapping[str, Any], field: str) -> dict[str, Any]:
        """The record's arguments, checked; nulls are left out. Raises DataError that names `field` and the rule."""
        given = {name: value for name, value in raw.items() if value is not None}
        for name in given.keys() - self.rules.keys():
            hint = did_you_mean(name, self.rules)
            raise DataError(f"{field}.{name}: must be an argument of {self.id}. There is none. {hint} {_FIX}")
        for name in sorted(self.required - given.keys()):
            raise DataError(f"{field}.{name}: must be given. {self.id} cannot be checked without it. {_FIX}")
        return {name: _checked(value, self.rules[name], f"{field}.{name}") for name, value in given.items()}


_REGISTERED: dict[str, Instruction] = {}


def instruction(instruction_id: str) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Register a checker under an id and return it unchanged. Raises ConfigError when the id is taken."""

    def register(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
        location = f"{check.__code__.co_filename}:{check.__code__.co_firstlineno}"
        if instruction_id in _REGISTERED:
            taken = f"It is defined at {_REGISTERED[instruction_id].location} and at {location}"
            raise ConfigError(
                [f"instruction = {instruction_id!r}: can be registered once. {taken}. Rename one of them."]
            )
        parameters = list(inspect.signature(check).parameters.values())[1:]
        hints = typing.get_type_hints(check)
        rules = {p.name: hints.get(p.name, Any) for p in parameters}
        required = frozenset(p.name for p in parameters if p.default is p.empty)
        _REGISTERED[instruction_id] = Instruction(instruction_id, check, rules, required, location)
        return check

    return register


def find(instruction_id: object, field: str) -> Instruction:
    """The instruction of that id. Raises DataError with the nearest id, naming the record's `field`."""
    if isinstance(instruction_id, str) and instruction_id in _REGISTERED:
        return _REGISTERED[instruction_id]
    fix = "One of your own registers with @instruction in a module named in rewards.modules."
    hint = did_you_mean(str(instruction_id), _REGISTERED)
    raise DataError(f"{field} = {instruction_id!r}: must be a registered instruction. There is none. {hint} {fix}")


def ids() -> tuple[str, ...]:
    """Every registered id, sorted."""
    return tuple(sorted(_REGISTERED))


def _checked(value: Any, rule: Any, field: str) -> Any:
    if rule is int:
        return _integer(value, field)
    if rule is str and not (isinstance(value, str) and value.strip()):
        raise DataError(f"{field} = {value!r}: must be a text that is not empty. Nothing could be compared. {_FIX}")
    if rule == list[str]:
        return _texts(value, field)
    if typing.get_origin(rule) is Literal and value not in typing.get_args(rule):
        allowed = ", ".join(map(repr, typing.get_args(rule)))
        raise DataError(f"{field} = {value!r}: must be one of {allowed}. Nothing else can be checked. {_FIX}")
    return value


def _integer(value: Any, field: str) -> int:
    """The integer; a float without a fraction is one, since data frames turn columns with nulls into floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{field} = {value!r}: must be an integer of at least 0. It is a count. {_FIX}")
    return value


def _texts(value: Any, field: str) -> list[str]:
    valid = isinstance(value, list | tuple) and value and all(isinstance(item, str) and item.strip() for item in value)
    if not valid:
        raise DataError(f"{field} = {value!r}: must be a list of texts, none empty. Nothing could be found. {_FIX}")
    return list(value)
