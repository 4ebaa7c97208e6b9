"""Equality of values in wire form, as strict about types as a record can say.

* bool equals only bool: `1` is not `True`. An int equals a float of exactly the same value: JSON does not tell `2` from
  `2.0` reliably, and neither does `==`. -0.0 equals 0.0.
* Where a float is expected it may be off by the tolerance, relative or absolute; infinities only equal themselves. NaN
  equals NaN where NaN is expected and nothing else.
* A list equals a tuple of equal items, because JSON records cannot say tuple; with `strict_sequences` it does not.
* A set equals only a set, a dict only a dict; their order does not matter.

Nothing here hashes, sorts by or calls what a candidate made: both sides are plain JSON.
"""

from __future__ import annotations

import math
from typing import Any

from rewards.code.inside.wire import Wire


def equal(expected: Wire, given: Wire, tolerance: float = 0.0, strict_sequences: bool = False) -> bool:
    """Whether the checked wire value `given` is what was `expected`."""
    return _Comparison(tolerance, strict_sequences).equal(expected, given)


def close(expected: Wire, given: Wire, relative: float, absolute: float) -> bool:
    """`math.isclose` of two real numbers; False for anything that is none."""
    if not (_is_number(expected) and _is_number(given)):
        return False
    try:
        return math.isclose(_number(expected), _number(given), rel_tol=relative, abs_tol=absolute)
    except OverflowError:  # an integer beyond every float
        return False


def truthy(wire: Wire) -> bool:
    """What `bool()` says of the value."""
    if isinstance(wire, list):
        kind, body = wire
        return bool(body) if kind in ("list", "tuple", "set", "dict", "bytes") else True
    return bool(wire)


class _Comparison:
    def __init__(self, tolerance: float, strict_sequences: bool) -> None:
        self._tolerance, self._strict_sequences = tolerance, strict_sequences

    def equal(self, expected: Wire, given: Wire) -> bool:
        if _is_number(expected) and _is_number(given):
            return self._numbers(_number(expected), _number(given))
        if not isinstance(expected, list) or not isinstance(given, list):
            return type(expected) is type(given) and bool(expected == given)
        kinds = {expected[0], given[0]}
        if kinds == {"list", "tuple"} and not self._strict_sequences:
            return self._items(expected[1], given[1])
        if len(kinds) == 2:
            return False
        return self._same_kind(expected[0], expected[1], given[1])

    def _same_kind(self, kind: str, expected: Any, given: Any) -> bool:
        match kind:
            case "list" | "tuple" | "complex":
                return self._items(expected, given)
            case "set":
                return self._items(sorted(expected, key=_order), sorted(given, key=_order))
            case "dict":
                ours, theirs = (sorted(body, key=lambda pair: _order(pair[0])) for body in (expected, given))
                return len(ours) == len(theirs) and all(map(self._pair, ours, theirs))
        return bool(expected == given)

    def _pair(self, expected: list[Wire], given: list[Wire]) -> bool:
        return equal(expected[0], given[0]) and self.equal(expected[1], given[1])

    def _items(self, expected: list[Wire], given: list[Wire]) -> bool:
        return len(expected) == len(given) and all(map(self.equal, expected, given))

    def _numbers(self, expected: int | float, given: int | float) -> bool:
        if _is_nan(expected):
            return _is_nan(given)
        if expected == given:
            return True
        if isinstance(expected, int) or not (math.isfinite(expected) and abs(given) < 1e308):
            return False
        return math.isclose(expected, given, rel_tol=self._tolerance, abs_tol=self._tolerance)


def _is_number(wire: Wire) -> bool:
    if isinstance(wire, list):
        return wire[0] in ("int", "float")
    return isinstance(wire, int | float) and not isinstance(wire, bool)


def _is_nan(number: int | float) -> bool:
    return number != number  # noqa: PLR0124 math.isnan overflows on long integers


def _number(wire: Wire) -> int | float:
    if isinstance(wire, list):
        return int(wire[1], 16) if wire[0] == "int" else float(wire[1])
    number: int | float = wire
    return number


def _order(wire: Wire) -> tuple[Any, ...]:
    """A total order over wire values that puts equal ones side by side."""
    if _is_number(wire):
        number = _number(wire)
        return (1, _is_nan(number), 0 if _is_nan(number) else number)
    if isinstance(wire, bool):
        return (0, wire)
    if isinstance(wire, str):
        return (2, wire)
    if wire is None:
        return (3,)
    kind, body = wire
    if kind == "bytes":
        return (4, body)
    items = [_order(item) for item in body] if kind != "dict" else [(_order(k), _order(v)) for k, v in body]
    if kind in ("set", "dict"):
        items.sort()
    return (6 if kind in ("set", "dict") else 5, tuple(items))
