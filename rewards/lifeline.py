"""Processes that end with the one that started them, however that ended.

python lifeline.py FD COMMAND ...    becomes COMMAND, whose process group is killed when the pipe at FD is closed
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys


def die_with_parent(lifeline_fd: int) -> None:
    """Have the kernel kill this process group when the other end of the pipe closes, however the parent ended.

    Unlike a reader thread it works while C code holds the interpreter lock and after an `exec`, and unlike
    PR_SET_PDEATHSIG it does not fire when merely the thread that started this process ends.
    """
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline_fd, 0)
    if poll.poll(0):  # hung up before O_ASYNC was set
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
