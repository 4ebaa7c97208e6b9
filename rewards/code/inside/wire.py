"""Python values as JSON that keeps their type: what travels between the grader and the sandbox.

`None`, bool, str, finite floats and integers below 2**63 stand for themselves; everything else is a pair:

    ["list", [..]]  ["tuple", [..]]  ["set", [..]]  ["dict", [[key, value], ..]]
    ["int", "-0x1f.."]  ["float", "nan" | "inf" | "-inf"]  ["complex", [re, im]]  ["bytes", "hex"]

Objects of other classes cannot travel, so no method of theirs is ever called by whoever compares.
"""

from __future__ import annotations

import math
from typing import Any

Wire = Any
MAX_DEPTH = 200
_SMALL = 1 << 63


class WireError(ValueError):
    """A value that cannot travel, or a message that is no value."""


def encode(value: Any, depth: int = 0) -> Wire:
    """The wire form of a plain value; subclasses travel as their built-in base. Raises WireError."""
    if depth > MAX_DEPTH:
        raise WireError(f"nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_SMALL < number < _SMALL else ["int", hex(number)]
    if isinstance(value, float):
        real = float.__float__(value)
        return real if math.isfinite(real) else ["float", str(real)]
    return _encode_compound(value, depth)


def decode(wire: Wire) -> Any:  # noqa: PLR0911 a return per type
    """The value of a checked wire form."""
    if not isinstance(wire, list):
        return wire
    kind, body = wire
    match kind:
        case "list" | "tuple" | "set":
            return {"list": list, "tuple": tuple, "set": set}[kind](map(decode, body))
        case "dict":
            return {decode(key): decode(value) for key, value in body}
        case "int":
            return int(body, 16)
        case "float":
            return float(body)
        case "complex":
            return complex(*map(decode, body))
    return bytes.fromhex(body)


def check(wire: Wire, depth: int = 0) -> Wire:
    """`wire` itself when it is well-formed. Raises WireError. Whatever a candidate sent goes through here first."""
    if depth > MAX_DEPTH:
        raise WireError(f"nested deeper than {MAX_DEPTH}")
    if wire is None or isinstance(wire, bool | str | int) or (isinstance(wire, float) and math.isfinite(wire)):
        return wire
    if not (isinstance(wire, list) and len(wire) == 2):
        raise WireError("not the form of a value")
    kind, body = wire
    if kind in ("list", "tuple", "set") and isinstance(body, list):
        for item in body:
            check(item, depth + 1)
    elif kind == "dict" and isinstance(body, list):
        _check_pairs(body, depth)
    elif not _is_scalar(kind, body):
        raise WireError("not the form of a value")
    return wire


def _encode_compound(value: Any, depth: int) -> Wire:
    if isinstance(value, list | tuple | set | frozenset):
        base: Any = next(base for base in (list, tuple, set, frozenset) if isinstance(value, base))
        kind = "set" if base is frozenset else base.__name__
        return [kind, [encode(item, depth + 1) for item in base.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in dict.items(value)]]
    if isinstance(value, complex):
        return ["complex", [encode(value.real), encode(value.imag)]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    raise WireError(f"a {type(value).__name__} is not a plain value")


def _check_pairs(body: list[Any], depth: int) -> None:
    for pair in body:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise WireError("not the form of a dict")
        check(pair[0], depth + 1)
        check(pair[1], depth + 1)


def _is_scalar(kind: Any, body: Any) -> bool:
    try:
        match kind, body:
            case "int", str():
                return hex(int(body, 16)) == body
            case "float", str():
                return body in ("nan", "inf", "-inf")
            case "complex", [re, im]:
                return all(isinstance(decode(check(part)), float) for part in (re, im))
            case "bytes", str():
                return bytes.fromhex(body).hex() == body
    except ValueError:
        return False
    return False
