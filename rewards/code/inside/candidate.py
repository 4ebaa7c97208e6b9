"""Serves a candidate's functions: one JSON question at a time, one JSON answer each.

    {"nonce": n, "source": text, "setup": text}              loads the solution; null
    {"nonce": n, "call": name, "args": wire, "kwargs": wire}   calls it; what it returned

Answers are {"nonce": n, "ok": wire} or {"nonce": n, "raised": built-in exception, "message": text}.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from wire import WireError, decode, encode

MODULE = "solution"


def serve(requests: int, answers: int) -> None:
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    sys.argv = [MODULE]
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix)]
    for question in lines(requests):
        answer = _answer(module, question)
        send(answers, {"nonce": question["nonce"], **answer})


def lines(fd: int) -> Iterator[dict[str, Any]]:
    """The JSON objects that arrive on `fd`, one a line, until it is closed."""
    with os.fdopen(fd, "rb") as stream:
        for line in stream:
            yield json.loads(line)


def send(fd: int, message: dict[str, Any]) -> None:
    """Write `message` as one line, all of it."""
    line = json.dumps(message, allow_nan=False).encode() + b"\n"
    while line:
        line = line[os.write(fd, line) :]


def _answer(module: types.ModuleType, question: dict[str, Any]) -> dict[str, Any]:
    try:
        if "source" in question:
            for name in ("setup", "source"):
                exec(compile(question[name], f"<{name}>", "exec"), module.__dict__)
            return {"ok": None}
        function = getattr(module, question["call"])
        return {"ok": encode(function(*decode(question["args"]), **decode(question["kwargs"])))}
    except WireError as error:
        return {"raised": "WireError", "message": f"returned what cannot be compared: {error}"}
    except BaseException as error:  # noqa: BLE001 whatever foreign code raises, SystemExit too, is its answer
        return {"raised": _builtin_name(error), "message": _text(error)}


def _builtin_name(error: BaseException) -> str:
    """The name of the nearest built-in class, which the referee can raise again."""
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300].encode("utf-8", "replace").decode()
    except BaseException:  # noqa: BLE001 a __str__ of the candidate's
        return type(error).__name__
