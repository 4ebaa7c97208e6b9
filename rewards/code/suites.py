"""Tests of a record, checked and brought into three shapes.

`metadata.tests` is a list of objects, each of one kind:

    {"call": "f", "args": [1, 2], "kwargs": {}, "expected": 3}     f(1, 2) must return 3; kwargs may be left out
    {"stdin": "1 2\\n", "stdout": "3\\n"}                            the program reads one and must print the other
    {"assert": "assert f(1, 2) == 3"}                              Python source, trusted: the record's author wrote it
    {"assert": "def check(candidate): ...", "entry_point": "f"}    `check` is called with f, as HumanEval does

An assert test may carry `setup`, source that runs before the solution and before the asserts; `entry_point` and `setup`
can also stand in the metadata, for all its assert tests. An assert source whose every assertion compares one call with
a constant becomes that many call tests (see `asserts`); any other is run by a referee in a sandbox of its own. A
referee too passes plain values only: what a test does to an argument in place, or to an object, is lost on the way.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.code import asserts
from rewards.code.inside.wire import Wire, WireError, encode
from rlhf.errors import DataError

KINDS = {
    "call": ({"call", "args", "expected"}, {"kwargs"}),
    "stdin": ({"stdin", "stdout"}, set()),
    "assert": ({"assert"}, {"entry_point", "setup"}),
}


@dataclass(frozen=True, slots=True)
class CallTest:
    """`name(*args, **kwargs)` must satisfy `relation` with `expected`; all values in wire form.

    "equal" compares as `compare.equal` does; "unequal" is its opposite; "close" allows `tolerance` (relative,
    absolute); "true" and "false" look at the truth of the value.
    """

    name: str
    args: Wire
    kwargs: Wire
    expected: Wire
    relation: asserts.Relation = "equal"
    tolerance: tuple[float, float] = (0.0, 0.0)
    setup: str = ""


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """The program gets `stdin` and must print `stdout`, white space at line ends and empty lines at the end aside."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class RefereeTest:
    """Source that a referee runs against the candidate's `functions`."""

    source: str
    functions: tuple[str, ...]
    entry_point: str | None
    setup: str = ""


CodeTest = CallTest | ProgramTest | RefereeTest


def parse(metadata: Mapping[str, Any]) -> tuple[CodeTest, ...]:
    """The tests of a record. Raises DataError that names the field, the rule and the fix."""
    records = metadata.get("tests")
    if not isinstance(records, Sequence) or isinstance(records, str) or not records:
        fix = "Add tests or drop the record."
        raise _broken("", records, "must be a non-empty list", "Nothing would be tested", fix)
    found: list[CodeTest] = []
    for position, record in enumerate(records):
        found += _parse_one(f"[{position}]", record, metadata)
    kinds = {isinstance(test, ProgramTest) for test in found}
    if len(kinds) > 1:
        raise _broken("", "...", "must not mix stdin tests with others", "A program is no module", "Split the record.")
    return tuple(found)


def _parse_one(where: str, record: Any, metadata: Mapping[str, Any]) -> list[CodeTest]:
    if not isinstance(record, Mapping):
        raise _broken(where, record, "must be an object", "A test has named fields", "See rewards/code/suites.py.")
    kind = next((kind for kind in KINDS if kind in record), None)
    if kind is None:
        names = "call, stdin or assert"
        raise _broken(where, dict(record), f"must have {names}", "Its kind is unknown", "Add the field.")
    required, optional = KINDS[kind]
    if wrong := (required - set(record)) | (set(record) - required - optional):
        fields = ", ".join(sorted(required | optional))
        reason = f"{', '.join(sorted(map(str, wrong)))} is missing or unknown"
        raise _broken(where, dict(record), f"a {kind} test has {fields}", reason, "Correct its fields.")
    match kind:
        case "call":
            return [_call(where, record)]
        case "stdin":
            return [ProgramTest(_text(where, record, "stdin"), _text(where, record, "stdout"))]
    return _assert(where, record, metadata)


def _call(where: str, record: Mapping[str, Any]) -> CallTest:
    name, args, kwargs = _text(where, record, "call"), record["args"], record.get("kwargs", {})
    if not name.isidentifier():
        raise _broken(f"{where}.call", name, "must be a function's name", "It is looked up by it", "Name the function.")
    if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        rule = "must be a list of arguments, kwargs an object"
        raise _broken(f"{where}.args", args, rule, "They are passed one by one", "Wrap a single argument in a list.")
    try:
        return CallTest(name, encode(list(args)), encode(dict(kwargs)), encode(record["expected"]))
    except WireError as error:
        raise _broken(where, dict(record), "must be plain JSON", str(error), "Use JSON values.") from None


def _assert(where: str, record: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[CodeTest]:
    source = _text(where, record, "assert")
    merged = {"entry_point": metadata.get("entry_point"), "setup": metadata.get("setup", ""), **record}
    entry_point, setup = merged["entry_point"], _text(where, merged, "setup")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise _broken(f"{where}.entry_point", entry_point, "must be a function's name", "check() is called with it", "")
    try:
        tree, setup_names = ast.parse(source), asserts.bound_names(ast.parse(setup))
    except (SyntaxError, ValueError) as error:
        raise _broken(f"{where}.assert", source, "must be Python", str(error), "Correct the source.") from None
    functions = asserts.candidate_names(tree, setup_names, entry_point)
    if not functions:
        rule = "must call the solution"
        raise _broken(f"{where}.assert", source, rule, "Nothing would be tested", "Add entry_point.")
    cases = asserts.rewrite(tree, functions, entry_point)
    if cases is None:
        return [RefereeTest(source, functions, entry_point, setup)]
    return [CallTest(c.name, c.args, c.kwargs, c.expected, c.relation, c.tolerance, setup) for c in cases]


def _text(where: str, record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise _broken(f"{where}.{field}", value, "must be text", "Nothing else can be run", "Quote it.")
    return value


def _broken(where: str, value: Any, rule: str, reason: str, fix: str) -> DataError:
    shown = repr(value)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    return DataError(f"metadata.tests{where} = {shown}: {rule}. {reason}. {fix}".rstrip())
