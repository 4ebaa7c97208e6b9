# ruff: noqa: PTH103, PTH112, PTH120, PTH123, PTH211 pathlib would cost milliseconds at every run
"""System calls that Python has no function for: namespaces, mounts, Landlock, seccomp, a subreaper. Through ctypes.

Every function raises OSError where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from lockdown import become

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_READ = 0b1101  # execute, read file, read directory
LANDLOCK_ALL_FS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # from ABI 5 on 16 rights

_libc = ctypes.CDLL(None, use_errno=True)


def filter_system_calls(program: bytes) -> None:
    """Install the BPF `program` for this process and all it starts."""

    class SockFprog(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = SockFprog(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(fprog), 0, 0)


def restrict_files(readable: Sequence[str]) -> None:
    """Landlock: only `readable` may be read and run; nothing may be written; no TCP; no signals to the outside."""
    abi = _call("syscall", LANDLOCK_CREATE_RULESET, None, 0, 1)
    files = LANDLOCK_ALL_FS.get(abi, (1 << 16) - 1)
    attributes = (ctypes.c_uint64 * 3)(files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _call("syscall", LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    for path in readable:
        _allow(ruleset, path)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str) -> None:
    class PathBeneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))

    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    directory, device = os.path.isdir(path), path.startswith("/dev/")
    rights = LANDLOCK_READ if directory else 0b110 if device else 0b101
    _call("syscall", LANDLOCK_ADD_RULE, ruleset, 1, ctypes.byref(PathBeneath(rights, fd)), 0)
    os.close(fd)


# --- a supervisor where there are no process namespaces ---------------------------------------------------------------


def supervise(plan: Mapping[str, Any]) -> None:
    """Fork: the child returns; this process stays behind and, when the child ends or it is told to, kills what is left.

    Everything the child starts and abandons becomes a child of the supervisor, so nothing outlives it.
    """
    uid = plan["uid"]
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: _end(uid))
    _die_with(plan["parent"], signal.SIGTERM)
    if child := os.fork():
        _leave_pipes()
        os.waitpid(child, 0)
        _end(uid)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die_with(parent: int, signal_number: int) -> None:
    _call("prctl", PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _end(uid: int | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while _kill_descendants(uid):
        while _reaped():
            pass
    os._exit(0)


def _kill_descendants(uid: int | None) -> bool:
    """Kill every descendant there is now; False when there was none. Under an own uid no fork can outrun it."""
    children = _children(os.getpid())
    if children and uid is not None:
        killer = os.fork()
        if killer == 0:
            become(uid)
            os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(killer, 0)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return bool(children)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]


def _reaped() -> bool:
    try:
        return os.waitpid(-1, 0)[0] > 0
    except ChildProcessError:
        return False


# --- namespaces without bubblewrap ------------------------------------------------------------------------------------


def enter_namespaces(plan: Mapping[str, Any]) -> None:
    """Return in a child of process 1 of new namespaces whose file system has only what the plan names.

    Process 1 ends with that child, and the kernel then ends everything else in the namespace.
    """
    uid, gid = os.getuid(), os.getgid()
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    _call("unshare", spaces | (CLONE_NEWUSER if uid else 0))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            _write(f"/proc/self/{name}", text)
    _die_with(plan["parent"], signal.SIGKILL)
    _fork_and_wait()
    _die_with(0, signal.SIGKILL)  # as seen from inside, a parent in another namespace is process 0
    _build_root(plan)
    _fork_and_wait()
    if uid:
        _drop_capabilities()


def _fork_and_wait() -> None:
    """Return in the child; the parent waits for it, reaps what it inherits, and ends when the child does."""
    child = os.fork()
    if child:
        _leave_pipes()
        while os.waitpid(-1, 0)[0] != child:
            pass
        os._exit(0)


def _leave_pipes() -> None:
    """Let go of the pipes, so that the other side sees the end of the child that uses them."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _build_root(plan: Mapping[str, Any]) -> None:
    """Make a small tmpfs with read-only views of the plan's folders, a fresh /proc and a bounded /tmp the root."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/tmp"  # only the place where the new root is put together: hidden by it in this namespace
    outside = {path: os.open(path, os.O_PATH) for path in (*plan["readable"], *plan["devices"])}
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    for path, fd in outside.items():
        _bind(fd, root + path, device=path in plan["devices"])
    for target, link in plan["links"]:
        os.symlink(link, root + target)
    os.makedirs(root + "/proc")
    _mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.makedirs(root + "/tmp")
    options = f"size={plan['tmp_bytes']},nr_inodes={plan['tmp_files']},mode=1777"
    _mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    for fd in outside.values():
        os.close(fd)
    os.chdir(root)
    _call("syscall", 155 if os.uname().machine == "x86_64" else 41, b".", b".")  # pivot_root: glibc has no wrapper
    _call("umount2", b".", MNT_DETACH)
    _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/tmp")


def _bind(source_fd: int, target: str, device: bool) -> None:
    source = f"/proc/self/fd/{source_fd}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, MS_BIND | MS_REC)
    if not device:
        _mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _drop_capabilities() -> None:
    """Of a new user namespace: its bounding set is emptied, then the capabilities themselves."""
    for capability in range(64):
        if _libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP ends with the last one the kernel knows
            break
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, text.encode())
    os.close(fd)


def _call(name: str, *arguments: Any) -> int:
    function: Callable[..., int] = getattr(_libc, name)
    result = function(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result
