"""The steps by which a fresh process gives up its rights before it runs anything foreign.

`apply(plan)` does what the plan names, in this order: namespaces with a private file system, resource limits, Landlock,
another user id, seccomp. Each step raises OSError where the kernel refuses it; nothing runs after a step that failed.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from typing import Any


def apply(plan: Mapping[str, Any]) -> None:
    """Returns in the process that may run foreign code; a supervisor it forked off on the way never returns."""
    if plan["tier"] == "strong":  # bubblewrap has done the rest, and importing ctypes costs more than all of it
        limit_resources(plan["rlimits"])
        become(plan["uid"])
    else:
        _apply_by_hand(plan)
    os.umask(0o077)


def _apply_by_hand(plan: Mapping[str, Any]) -> None:
    import kernel

    kernel.enter_namespaces(plan) if plan["tier"] == "userns" else kernel.supervise(plan)
    limit_resources(plan["rlimits"])
    if plan["tier"] == "landlock":
        kernel.restrict_files(plan["readable"])
    become(plan["uid"])
    if plan["seccomp"]:
        kernel.filter_system_calls(bytes.fromhex(plan["seccomp"]))


def limit_resources(limits: Mapping[str, int]) -> None:
    """Set hard and soft limits by name ("AS", "CPU", ...); a lower hard limit that is already there stays."""
    for name, limit in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (value, value))


def become(uid: int | None) -> None:
    """Give up root for `uid`, for good; None where there is nothing to give up."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
