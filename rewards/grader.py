"""The main loop of one killable grader process: `python -m rewards.grader REQUESTS RESULTS LIFELINE BYTES MODULE...`.

Reads batches of pickled calls from the file descriptor REQUESTS and writes one JSON line per call to RESULTS, as soon
as it is known. Reward functions run in the main thread of a process without torch or Ray, under an address-space limit,
so they may use SIGALRM, run out of memory, or be killed in the middle. Their prints go to stderr.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import resource
import select
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import Any, BinaryIO

from rewards import registry
from rlhf.errors import ConfigError
from rlhf.plugins import load_modules

MAX_REASON_CHARS = 500
MAX_TRACEBACK_CHARS = 8000


def main(arguments: list[str]) -> None:
    requests_fd, results_fd, lifeline_fd, memory_limit_bytes = map(int, arguments[:4])
    die_with_parent(lifeline_fd)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for fd in (requests_fd, results_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    with os.fdopen(requests_fd, "rb") as requests, os.fdopen(results_fd, "wb", buffering=0) as results:
        _write(results, _catalogue(arguments[4:]))
        _serve(requests, results)


def die_with_parent(lifeline_fd: int) -> None:
    """Have the kernel kill this process group when the other end of the pipe closes, however the parent ended.

    Unlike a reader thread it works while C code holds the interpreter lock, and unlike PR_SET_PDEATHSIG it does not
    fire when merely the thread that started this process ends.
    """
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline_fd, 0)
    if poll.poll(0):  # hung up before O_ASYNC was set
        os._exit(1)


def _catalogue(modules: Iterable[str]) -> dict[str, Any]:
    """The first line: every registered reward with its parameters, or why the modules cannot be loaded."""
    try:
        load_modules("rewards.modules", modules)
        functions = [registry.lookup(name) for name in registry.names()]
    except ConfigError as error:
        return {"kind": "config_error", "problems": error.problems}
    return {"kind": "ready", "rewards": {f.name: {"accepts": f.accepts, "requires": f.requires} for f in functions}}


def _serve(requests: BinaryIO, results: BinaryIO) -> None:
    owner = os.getpid()
    while header := requests.read(8):
        for call in pickle.loads(requests.read(int.from_bytes(header, "big"))):
            result = _judge(call)
            if os.getpid() != owner:  # a copy that a reward function forked: only the original answers
                os._exit(1)
            _write(results, result)


def _judge(call: bytes) -> dict[str, Any]:
    """The verdict on one pickled (name, sample, params) as plain data. Whatever the author's code raises is data."""
    try:
        name, sample, params = pickle.loads(call)
        verdict = registry.lookup(name).judge(sample, params)
    except registry.InvalidRewardError as error:
        return {"kind": "invalid", "message": str(error), "traceback": ""}
    except MemoryError as error:
        return _raised("memory", error)
    except BaseException as error:  # noqa: BLE001 SystemExit and KeyboardInterrupt too: the function may not end the process
        return _raised("raised", error)
    if isinstance(verdict, registry.Abstain):
        return {"kind": "abstain", "reason": verdict.reason[:MAX_REASON_CHARS]}
    reason = verdict.reason[:MAX_REASON_CHARS]
    return {"kind": "score", "value": verdict.value, "reason": reason, "parts": dict(verdict.parts)}


def _raised(kind: str, error: BaseException) -> dict[str, Any]:
    """The exception with its traceback from the author's function on: our own two frames are left out."""
    frames = error.__traceback__
    for _ in range(2):
        frames = frames.tb_next if frames is not None and frames.tb_next is not None else frames
    text = "".join(traceback.format_exception(type(error), error, frames))
    message = f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]
    return {"kind": kind, "message": message, "traceback": text[-MAX_TRACEBACK_CHARS:]}


def _write(results: BinaryIO, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[results.write(line) :]


if __name__ == "__main__":
    main(sys.argv[1:])
