"""A seccomp filter as raw BPF: what a candidate's process may not ask of the kernel, whatever user it is.

Refused calls fail with EPERM, so that honest programs go on; `clone3` with ENOSYS, so that the C library falls back to
`clone`, whose flags the filter can read. A call of a foreign architecture or of the x32 table kills the process.
"""

from __future__ import annotations

import errno
import os
import struct
from functools import cache

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS}
_X32_BIT = 0x40000000

# name: (x86_64, aarch64); None where the architecture has no such call
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes' memory, descriptors and state
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "move_mount": (429, 429),
    "open_tree": (428, 428), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    # parts of the kernel that code under test has no use for and exploits do
    "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "modify_ldt": (154, None),
    "personality": (135, 92), "vmsplice": (278, 75),
    # the machine itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "quotactl": (179, 60), "quotactl_fd": (443, 443), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "iopl": (172, None),
    "ioperm": (173, None), "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
    "mknod": (133, None), "mknodat": (259, 33),
    # what is written beside a file's content: Landlock does not see it, and it may be on any file that all may write
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # the network, and memory that no process is seen to hold
    "socket": (41, 198), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
# Modes, owners and times of files, which Landlock does not see either; a file system of its own needs none refused.
_REFUSED_ON_SHARED_FILES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip
# (number on x86_64, on aarch64, argument): allowed where that argument is 0, the caller itself, and no other process.
_ON_ITSELF = {
    "prlimit64": (302, 261, 0), "setpriority": (141, 140, 1), "ioprio_set": (251, 30, 1),
    "sched_setparam": (142, 118, 0), "sched_setscheduler": (144, 119, 0), "sched_setaffinity": (203, 122, 0),
    "sched_setattr": (314, 274, 0),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def supported() -> bool:
    """Whether the filter exists for this machine's architecture."""
    return os.uname().machine in _ARCHITECTURES


@cache
def program(shared_files: bool = False) -> bytes:
    """The filter for this machine: an array of `struct sock_filter`, as seccomp(2) and `bwrap --seccomp` take it.

    `shared_files`: the sandbox sees the machine's own files, so their modes, owners and times may not be changed.
    """
    column, architecture = _ARCHITECTURES[os.uname().machine]
    table = _REFUSED | (_REFUSED_ON_SHARED_FILES if shared_files else {})
    refused = sorted(number for row in table.values() if (number := row[column]) is not None)
    code = [
        _step(_LOAD, _ARCH_OFFSET),
        _step(_JUMP_EQUAL, architecture, yes=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_OFFSET),
        _step(_JUMP_AT_LEAST, _X32_BIT, no=1),
        _step(_RETURN, _KILL),
    ]
    for number in refused:
        code += [_step(_JUMP_EQUAL, number, no=1), _step(_RETURN, _ERRNO | errno.EPERM)]
    for row in _ON_ITSELF.values():
        code += [
            _step(_JUMP_EQUAL, row[column], no=4),
            _step(_LOAD, _FIRST_ARGUMENT_OFFSET + 8 * row[2]),
            _step(_JUMP_EQUAL, 0, no=1),
            _step(_RETURN, _ALLOW),
            _step(_RETURN, _ERRNO | errno.EPERM),
        ]
    code += [_step(_JUMP_EQUAL, _CLONE3[column], no=1), _step(_RETURN, _ERRNO | errno.ENOSYS)]
    code += [
        _step(_JUMP_EQUAL, _CLONE[column], no=3),
        _step(_LOAD, _FIRST_ARGUMENT_OFFSET),
        _step(_JUMP_SET, _NAMESPACE_FLAGS, no=1),
        _step(_RETURN, _ERRNO | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, k)
