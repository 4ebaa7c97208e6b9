"""Assert sources rewritten, without running them, to calls with constant arguments and constant expectations.

    assert f(1) == [2]          f(1) equal [2]          assert f(1) is None         f(1) equal None
    assert f(1)                 f(1) true               assert not f(1)             f(1) false
    assert f(1) != 2            f(1) unequal 2          assert math.isclose(f(1), 2.5, rel_tol=1e-3)
    assert abs(f(1) - 2.5) < e  f(1) close to 2.5

Either side of a comparison may be the call. Beside assertions a source may hold imports, docstrings, assignments of
constants that no assertion uses, and one function `check(candidate)` with the same in it. For anything else `rewrite`
says None.
"""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rewards.code.inside.wire import Wire, WireError, encode

Relation = Literal["equal", "unequal", "close", "true", "false"]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_MAKERS: dict[str, Callable[..., Any]] = {
    "set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "dict": dict, "float": float, "complex": complex,
}  # fmt: skip
_MAX_SIZE = 100_000


class NotConstantError(Exception):
    """An expression whose value is not plain from its text."""


@dataclass(frozen=True, slots=True)
class Case:
    """One assertion as a question and what its answer must be, in wire form."""

    name: str
    args: Wire
    kwargs: Wire
    expected: Wire
    relation: Relation
    tolerance: tuple[float, float] = (0.0, 0.0)


def rewrite(tree: ast.Module, functions: Iterable[str], entry_point: str | None) -> list[Case] | None:
    """The assertions of `tree` as cases, in order; None where it has anything else or has none."""
    targets = {name: name for name in functions}
    assertions: list[ast.Assert] = []
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "check" and len(statement.args.args) == 1:
            if entry_point is None or not _collect(statement.body, assertions):
                return None
            targets[statement.args.args[0].arg] = entry_point
        elif not _is_check_call(statement) and not _collect([statement], assertions):
            return None
    try:
        cases = [case for assertion in assertions if (case := _case(assertion.test, targets)) is not None]
    except (NotConstantError, WireError, ArithmeticError, TypeError, ValueError):
        return None
    return cases or None


def candidate_names(tree: ast.Module, elsewhere: Iterable[str], entry_point: str | None) -> tuple[str, ...]:
    """The names that `tree` uses and nothing but the solution can define; the entry point alone where there is one."""
    if entry_point is not None:
        return (entry_point,)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return tuple(sorted(used - bound_names(tree) - set(elsewhere) - set(dir(builtins))))


def bound_names(tree: ast.AST) -> set[str]:
    """Every name that `tree` gives a meaning to, in whatever scope."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def constant(node: ast.expr) -> Any:
    """The value of an expression made of literals, + - * / **, and set(), list(), tuple(), dict(), float(), complex().

    Raises NotConstantError for any other, and for what would be large.
    """
    match node:
        case ast.Constant(value):
            return value
        case ast.List(items) | ast.Tuple(items) | ast.Set(items):
            made: Any = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return made([constant(item) for item in items])
        case ast.Dict(keys, values) if None not in keys:
            return {constant(key): constant(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case ast.UnaryOp(ast.USub(), operand):
            return -constant(operand)
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            return _arithmetic(type(op), constant(left), constant(right))
        case ast.Call(ast.Name(name), args, []) if name in _MAKERS:
            return _MAKERS[name](*map(constant, args))
    raise NotConstantError


def _arithmetic(op: type[ast.operator], left: Any, right: Any) -> Any:
    sizes = [len(side) for side in (left, right) if hasattr(side, "__len__")]
    if op is ast.Mult and sizes:
        sizes.append(sizes[0] * next((abs(side) for side in (left, right) if isinstance(side, int)), 1))
    if max(sizes, default=0) > _MAX_SIZE or (op is ast.Pow and not (abs(left) <= 10**6 and abs(right) <= 1000)):
        raise NotConstantError
    return _BINARY[op](left, right)


def _collect(body: Iterable[ast.stmt], assertions: list[ast.Assert]) -> bool:
    """Add the assertions of `body` to the list; False when it holds what might matter to them."""
    for statement in body:
        match statement:
            case ast.Assert():
                assertions.append(statement)
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(ast.Constant()):
                continue
            case ast.Assign([ast.Name()], value) if _is_constant(value):
                continue
            case _:
                return False
    return True


def _is_constant(node: ast.expr) -> bool:
    try:
        constant(node)
    except (NotConstantError, ArithmeticError, TypeError, ValueError):
        return False
    return True


def _is_check_call(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(ast.Call(ast.Name("check"), [ast.Name()], [])):
            return True
    return False


def _case(test: ast.expr, targets: dict[str, str]) -> Case | None:
    """The case of one assertion, None for one that is constantly true. Raises NotConstantError."""
    match test:
        case ast.Constant(value) if value:
            return None
        case ast.UnaryOp(ast.Not(), operand):
            return _question(operand, targets, None, "false")
        case ast.Compare(left, [op], [right]):
            return _comparison(left, op, right, targets)
        case ast.Call(ast.Attribute(ast.Name("math"), "isclose"), [left, right], keywords):
            given = {keyword.arg: float(constant(keyword.value)) for keyword in keywords}
            if set(given) - {"rel_tol", "abs_tol"}:
                raise NotConstantError
            tolerance = (given.get("rel_tol", 1e-9), given.get("abs_tol", 0.0))
            return _either_way(left, right, targets, "close", tolerance)
    return _question(test, targets, None, "true")


def _comparison(left: ast.expr, op: ast.cmpop, right: ast.expr, targets: dict[str, str]) -> Case:
    match op, left:
        case ast.Eq(), _:
            return _either_way(left, right, targets, "equal")
        case ast.Is(), _ if isinstance(right, ast.Constant) and (right.value is None or isinstance(right.value, bool)):
            return _question(left, targets, right.value, "equal")
        case ast.NotEq(), _:
            return _either_way(left, right, targets, "unequal")
        case ((ast.Lt() | ast.LtE()), ast.Call(ast.Name("abs"), [ast.BinOp(one, ast.Sub(), other)], [])):
            return _either_way(one, other, targets, "close", (0.0, float(constant(right))))
    raise NotConstantError


def _either_way(
    left: ast.expr,
    right: ast.expr,
    targets: dict[str, str],
    relation: Relation,
    tolerance: tuple[float, float] = (0.0, 0.0),
) -> Case:
    call, value = (right, left) if _is_constant(left) else (left, right)
    return _question(call, targets, constant(value), relation, tolerance)


def _question(
    call: ast.expr,
    targets: dict[str, str],
    expected: Any,
    relation: Relation,
    tolerance: tuple[float, float] = (0.0, 0.0),
) -> Case:
    match call:
        case ast.Call(ast.Name(name), args, keywords) if name in targets and all(k.arg for k in keywords):
            kwargs = {str(keyword.arg): constant(keyword.value) for keyword in keywords}
            given = encode([constant(arg) for arg in args])
            return Case(targets[name], given, encode(kwargs), encode(expected), relation, tolerance)
    raise NotConstantError
