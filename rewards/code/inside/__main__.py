"""The first process inside the sandbox: `python -I -S inside PLAN`. It locks itself down, then becomes what is run.

PLAN is JSON without secrets: `mode` is "calls" (serve a candidate's functions), "referee" (run trusted asserts against
a candidate elsewhere) or "program" (a whole program; `command` is [suffix of its file, argument, ...]), the rest is for
`lockdown.apply`. Nothing in here is trusted by the grader: whatever it writes is only ever an answer to the one
question that was asked.
"""

from __future__ import annotations

import json
import os
import sys
import types


def main(plan_text: str) -> None:
    plan = json.loads(plan_text)
    import candidate
    import lockdown
    import referee  # all before the folder they are in is out of reach

    lockdown.apply(plan)
    os.write(1, b'{"ready": true}\n')  # the clock of the candidate starts here, not when this process was asked for
    if plan["mode"] == "program":
        run_program(plan["command"])
        return
    requests, answers = take_channel()
    {"calls": candidate.serve, "referee": referee.serve}[plan["mode"]](requests, answers)
    os._exit(0)  # the last answer has been given: nothing that foreign code left for the end is of interest


def run_program(command: list[str]) -> None:
    """Read the source, eight bytes of length before it, from stdin; run it as Python, or as a file by `command`."""
    source = read_exactly(int.from_bytes(read_exactly(8), "big")).decode()
    if not command:
        sys.argv, sys.path[:] = ["main.py"], sys.path[1:]
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(source, "main.py", "exec"), module.__dict__)
        return
    name = "main" + command[0]
    fd = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(source)
    arguments = [argument.replace("{source}", name) for argument in command[1:]]
    os.execvp(arguments[0], arguments)


def read_exactly(count: int) -> bytes:
    """The next `count` bytes of stdin and not one more: the rest is the program's input."""
    data = b""
    while len(data) < count and (chunk := os.read(0, count - len(data))):
        data += chunk
    return data


def take_channel() -> tuple[int, int]:
    """The pipes to the grader as (requests, answers), moved away from stdin and stdout, which become /dev/null."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    return requests, answers


if __name__ == "__main__":
    main(sys.argv.pop())
