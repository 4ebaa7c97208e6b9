"""Which tier this machine can really give: each is tried by a program that attempts to get out."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewards.code import launch, seccomp
from rewards.code.inside.wire import decode, encode
from rewards.code.launch import Limits, Tier
from rewards.code.sandbox import Breach, Sandbox
from rlhf.errors import ConfigError, WorkerLostError

ORDER = (Tier.STRONG, Tier.USERNS, Tier.LANDLOCK)
PROBE_LIMITS = Limits(wall_s=10, test_s=10)

PROBE = """
import ctypes, os, signal, socket, sys

def works():
    import collections, decimal, heapq, itertools, json, math, random, re, string
    return json.loads("[1]") + [os.getuid() != 0 or os.geteuid() != 0]

def succeeded(action, *arguments):
    try:
        return action(*arguments) not in (-1, None)
    except BaseException:
        return False

def escapes(canary, port, victim):
    call = ctypes.CDLL(None).syscall
    numbers = {"x86_64": (272, 101, 165), "aarch64": (97, 117, 40)}[os.uname().machine]
    attempts = {
        "read a file of the machine": (open, canary),
        "(judged from outside)": (lambda: open(canary + ".new", "w") and None,),
        "write to the file system": (open, "/usr/groupwise", "w"),
        "connect to a port of the machine": (lambda: socket.create_connection(("127.0.0.1", port), 1),),
        "(judged from outside too)": (lambda: os.kill(victim, signal.SIGKILL),),
        "become root": (lambda: os.setuid(0) or 1,),
        "make a namespace": (call, numbers[0], 0x10000000),
        "trace": (call, numbers[1], 0, 0, 0, 0),
        "mount": (call, numbers[2], b"none", b"/tmp", b"tmpfs", 0, 0),
        "see the environment": (lambda: "GROUPWISE_PROBE" in os.environ or None,),
    }
    return sorted(name for name, attempt in attempts.items() if succeeded(*attempt))

def linger(token):
    if os.fork():
        return True
    os.setsid()
    if os.fork():
        os._exit(0)
    for signal_number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)", token])
"""


@functools.cache
def self_test() -> Tier:
    """The strongest tier that holds here, found once per process. Raises ConfigError (refuse) when none does."""
    problems = []
    for tier in ORDER:
        problem = probe(tier)
        if problem is None:
            return tier
        problems.append(f"{tier.value}: {problem}")
    raise ConfigError(
        [
            "reward 'code' = no sandbox: one of strong, userns, landlock must hold. Foreign code would run unguarded. "
            f"Install bubblewrap and allow user namespaces, or set allow_unsafe. Tried: {'; '.join(problems)}"
        ]
    )


@functools.cache
def probe(tier: Tier) -> str | None:
    """None when `tier` works here and holds, else why not."""
    if not seccomp.supported():
        return f"no seccomp filter for {os.uname().machine}"
    if tier is Tier.STRONG and launch.bubblewrap() is None:
        return "bwrap is not installed"
    try:
        return _probe(tier)
    except (Breach, OSError, WorkerLostError) as error:
        return f"does not start here ({error})"


def _probe(tier: Tier) -> str | None:
    token = f"groupwise-probe-{uuid.uuid4().hex}"
    with _surroundings() as (canary, port, victim), Sandbox.start(tier, PROBE_LIMITS, "calls") as sandbox:
        deadline = time.monotonic() + PROBE_LIMITS.wall_s
        loaded = sandbox.ask({"source": PROBE, "setup": ""}, deadline)
        works = _call(sandbox, deadline, "works")
        escapes = _call(sandbox, deadline, "escapes", canary, port, victim.pid)
        lingers = _call(sandbox, deadline, "linger", token)
        time.sleep(0.02)
        killed = victim.poll() is not None
        written = Path(canary + ".new").exists()  # in a /tmp of its own it may
    if "raised" in loaded or works != [1, True] or lingers is not True:
        return f"honest code does not run ({loaded.get('message') or works})"
    if escapes or killed or written:
        return f"a candidate can {escapes or 'kill or write outside'}"
    return "a candidate can leave a process behind" if _running(token) else None


def _call(sandbox: Sandbox, deadline: float, name: str, *args: object) -> object:
    answer = sandbox.ask({"call": name, "args": encode(list(args)), "kwargs": encode({})}, deadline)
    return decode(answer["ok"]) if "ok" in answer else answer["message"]


@contextmanager
def _surroundings() -> Iterator[tuple[str, int, subprocess.Popen[bytes]]]:
    """What a candidate may not reach: (a file all may read, a port that listens, a process)."""
    with tempfile.NamedTemporaryFile() as canary, socket.create_server(("127.0.0.1", 0)) as server:
        Path(canary.name).chmod(0o644)
        victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
        try:
            yield canary.name, server.getsockname()[1], victim
        finally:
            victim.kill()
            victim.wait()


def _running(token: str) -> bool:
    """Whether a process with `token` on its command line is left."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if token.encode() in path.read_bytes():
                return True
        except OSError:  # it ended meanwhile
            continue
    return False
