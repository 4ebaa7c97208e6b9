"""Runs trusted test source against a candidate that lives in another sandbox.

The test sees functions that put the call on the wire and return plain values, so no object of the candidate's is ever
in this process. The verdict is a message of its own, written after the last line of the test has run.

    <- {"nonce": n, "test": text, "setup": text, "functions": [names], "entry_point": name | null}
    -> {"nonce": n, "call": name, "args": .., "kwargs": ..}   <- {"ok": wire} | {"raised": type, "message": text}
    -> {"nonce": n, "verdict": "passed" | "failed" | "error", "message": text, "calls": count}
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from typing import Any

from candidate import lines, send
from wire import decode, encode


class Proxy:
    """The candidate's functions, as seen by the test."""

    def __init__(self, nonce: str, replies: Iterator[dict[str, Any]], answers: int) -> None:
        self.calls = 0
        self._nonce, self._replies, self._answers = nonce, replies, answers

    def function(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            message = {"nonce": self._nonce, "call": name, "args": encode(list(args)), "kwargs": encode(kwargs)}
            send(self._answers, message)
            reply = next(self._replies)
            if "raised" in reply:
                raise exception(reply["raised"])(reply["message"])
            return decode(reply["ok"])

        call.__name__ = name
        return call


def serve(requests: int, answers: int) -> None:
    incoming = lines(requests)
    question = next(incoming)
    proxy = Proxy(question["nonce"], incoming, answers)
    verdict, message = _run(question, proxy)
    send(answers, {"nonce": question["nonce"], "verdict": verdict, "message": message[:300], "calls": proxy.calls})


def exception(name: str) -> type[Exception]:
    """The built-in exception of that name; RuntimeError for what would end the referee rather than fail the test."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError
    return RuntimeError if issubclass(kind, StopIteration | UnicodeError | BaseExceptionGroup) else kind


def _run(question: dict[str, Any], proxy: Proxy) -> tuple[str, str]:
    entry_point = question["entry_point"]
    names = {name: proxy.function(name) for name in question["functions"]}
    if entry_point is not None:
        names |= {"candidate": proxy.function(entry_point), entry_point: proxy.function(entry_point)}
    scope: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(question["setup"], "<setup>", "exec"), scope)
        scope |= names
        exec(compile(question["test"], "<test>", "exec"), scope)
        if entry_point is not None and callable(scope.get("check")):
            scope["check"](scope[entry_point])
    except AssertionError as error:
        return "failed", f"assertion failed {error}"
    except Exception as error:  # noqa: BLE001 what the candidate returned may make any line of the test raise
        return ("failed" if proxy.calls else "error"), f"{type(error).__name__}: {error}"
    return "passed", ""
