"""The main loop of one killable grader process: `python -m rewards.grader MODE REQUESTS RESULTS LIFELINE BYTES SETUP`.

Reads batches of pickled calls from the file descriptor REQUESTS and writes one JSON line per call to RESULTS, as soon
as it is known. MODE `one` runs them one after the other in the main thread, `many` runs async functions side by side
on one event loop and ends those that pass their deadline. SETUP is JSON: the modules and foreign functions to load.

Reward functions run in a process without torch or Ray, under an address-space limit, so they may use SIGALRM, run out
of memory, or be killed in the middle. Their prints go to stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import resource
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rewards import foreign, registry
from rewards.lifeline import die_with_parent
from rewards.registry import Abstain, InvalidRewardError, RewardFunction, Score, TransientRewardError, printable
from rlhf.errors import ConfigError
from rlhf.plugins import load_modules

CANARY = ""
"""As the name of a component: answer without running anything."""

MAX_REASON_CHARS = 500
MAX_TRACEBACK_CHARS = 8000

_OWN_FRAMES = (__file__, registry.__file__, foreign.__file__, str(Path(asyncio.__file__).parent))


def main(arguments: list[str]) -> None:
    requests_fd, results_fd, lifeline_fd, memory_limit_bytes = map(int, arguments[1:5])
    die_with_parent(lifeline_fd)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for fd in (requests_fd, results_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    with os.fdopen(requests_fd, "rb") as requests, os.fdopen(results_fd, "wb", buffering=0) as results:
        _write(results, _catalogue(json.loads(arguments[5])))
        _serve(requests, results) if arguments[0] == "one" else asyncio.run(_serve_many(requests, results))


def _catalogue(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The first line: every registered reward as plain data, or why the modules cannot be loaded."""
    try:
        load_modules("rewards.modules", setup["modules"])
        registry.names()  # the built-in ones first: a foreign one must not take their name
        for item in setup["foreign"]:
            foreign.register(foreign.Foreign(**item))
        functions = [registry.lookup(name) for name in registry.names()]
    except ConfigError as error:
        return {"kind": "config_error", "problems": error.problems}
    return {"kind": "ready", "rewards": {f.name: _described(f) for f in functions}}


def _described(function: RewardFunction) -> dict[str, Any]:
    return {
        "accepts": function.accepts,
        "requires": function.requires,
        "group": function.group,
        "is_async": function.is_async,
        "missing_packages": function.missing_packages,
        "version": function.version,
    }


# --- one after the other ----------------------------------------------------------------------------------------------


def _serve(requests: BinaryIO, results: BinaryIO) -> None:
    owner = os.getpid()
    while header := requests.read(8):
        for _, call in pickle.loads(requests.read(int.from_bytes(header, "big"))):
            result = _judge(call)
            if os.getpid() != owner:  # a copy that a reward function forked: only the original answers
                os._exit(1)
            _write(results, result)


def _judge(call: bytes) -> dict[str, Any]:
    """The verdict on one pickled (name, sample or samples, params) as plain data. What the author's code raises too."""
    function: RewardFunction | None = None
    try:
        name, seen, params, _ = pickle.loads(call)
        if name == CANARY:
            return _verdict(Score(1.0))
        function = registry.lookup(name)
        if function.group:
            return _verdicts(function.judge_group(seen, params))
        return _verdict(function.judge(seen, params))
    except BaseException as error:  # noqa: BLE001 SystemExit and KeyboardInterrupt too: the function may not end the process
        return _failure(function, error)


# --- side by side -----------------------------------------------------------------------------------------------------


async def _serve_many(requests: BinaryIO, results: BinaryIO) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), requests)
    running: set[asyncio.Task[None]] = set()
    owner = os.getpid()
    while True:
        try:
            size = int.from_bytes(await reader.readexactly(8), "big")
            calls = pickle.loads(await reader.readexactly(size))
        except asyncio.IncompleteReadError:
            return
        for number, call in calls:
            task = asyncio.create_task(_answer(results, owner, number, call))
            running.add(task)
            task.add_done_callback(running.discard)


async def _answer(results: BinaryIO, owner: int, number: int, call: bytes) -> None:
    result = await _judge_async(call)
    if os.getpid() != owner:
        os._exit(1)
    # Small writes to a pipe that the parent always reads do not hold up the loop.
    _write(results, {"call": number} | result)


async def _judge_async(call: bytes) -> dict[str, Any]:
    function: RewardFunction | None = None
    timeout: asyncio.Timeout | None = None
    try:
        name, seen, params, deadline_s = pickle.loads(call)
        if name == CANARY:
            return _verdict(Score(1.0))
        function = registry.lookup(name)
        async with asyncio.timeout(deadline_s) as timeout:
            returned = await function.function(seen, **params)
        if timeout.expired():  # it caught the cancellation and went on
            raise TimeoutError
        if function.group:
            return _verdicts(function.checked_group(returned, len(seen)))
        return _verdict(function.checked(returned))
    except TimeoutError as error:
        if timeout is not None and timeout.expired():
            message = f"overran its deadline of {deadline_s:g} s; the call was cancelled"
            return {"kind": "timeout", "message": message, "traceback": _traceback(error)}
        return _failure(function, error)
    except BaseException as error:  # noqa: BLE001 CancelledError and SystemExit too: one call may not end the others
        return _failure(function, error)


# --- verdicts as plain data -------------------------------------------------------------------------------------------


def _verdicts(verdicts: list[Score | Abstain | InvalidRewardError]) -> dict[str, Any]:
    return {"kind": "group", "verdicts": [_verdict(verdict) for verdict in verdicts]}


def _verdict(verdict: Score | Abstain | InvalidRewardError) -> dict[str, Any]:
    if isinstance(verdict, InvalidRewardError):
        return _invalid(verdict)
    reason = printable(verdict.reason, MAX_REASON_CHARS)
    if isinstance(verdict, Abstain):
        return {"kind": "abstain", "reason": reason}
    return {"kind": "score", "value": verdict.value, "reason": reason, "parts": dict(verdict.parts)}


def _failure(function: RewardFunction | None, error: BaseException) -> dict[str, Any]:
    if isinstance(error, InvalidRewardError):
        return _invalid(error)
    kind = "memory" if isinstance(error, MemoryError) else "raised"
    if function is not None and function.is_transient(error):
        kind = "transient"
    message = printable(f"{type(error).__name__}: {error}", MAX_REASON_CHARS)
    wait_s = error.wait_s if isinstance(error, TransientRewardError) else 0.0
    return {"kind": kind, "message": message, "traceback": _traceback(error), "wait_s": wait_s}


def _invalid(error: InvalidRewardError) -> dict[str, Any]:
    return {"kind": error.kind, "message": str(error), "traceback": error.trace[-MAX_TRACEBACK_CHARS:]}


def _traceback(error: BaseException) -> str:
    """The exception with its traceback from the author's function on: our own frames before it are left out."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_OWN_FRAMES):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
    return text[-MAX_TRACEBACK_CHARS:]


def _write(results: BinaryIO, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[results.write(line) :]


if __name__ == "__main__":
    main(sys.argv[1:])
