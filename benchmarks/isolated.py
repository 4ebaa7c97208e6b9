"""Run a function of this package in a fresh process: its memory and threads are then its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import TrainingConfig
from rlhf.training.zero_settings import memory_environment

REPOSITORY = Path(__file__).parents[1]
_PROGRAM = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
result = getattr(importlib.import_module(module), name)(*arguments)
print("RESULT " + json.dumps(result))
"""


def isolated(
    function: Callable[..., Any], *arguments: Any, root: Path = REPOSITORY, environment: Mapping[str, str] | None = None
) -> Any:
    """The JSON result of `function(*arguments)` in a new interpreter with the packages of the checkout `root`."""
    call = json.dumps([function.__module__, function.__name__, arguments])
    return finish(start_script([sys.executable, "-c", _PROGRAM, call], root=root, environment=environment))


def run_zero3_ranks(module: str, ranks: int, arguments: Sequence[Any]) -> list[Any]:
    """The results of `python -m module '[rank, ranks, *arguments]'`, run for all ranks at once as a run starts them."""
    environment = {"OMP_NUM_THREADS": "1", **memory_environment(TrainingConfig(zero_stage=3))}
    calls = [json.dumps([rank, ranks, *arguments]) for rank in range(ranks)]
    started = [start_script([sys.executable, "-m", module, call], environment=environment) for call in calls]
    return [finish(process) for process in started]


def start_script(
    command: list[str], *, root: Path = REPOSITORY, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `command` with the packages of the checkout `root` before those of this process."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    return subprocess.Popen(
        command,
        cwd=root,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Any:
    """The result of a started process. Raises RuntimeError with the end of its output when it failed."""
    output, _ = process.communicate()
    found = [line for line in output.splitlines() if "RESULT " in line]
    if process.returncode or not found:
        raise RuntimeError(f"a measurement ended with status {process.returncode}:\n{output[-3000:]}")
    return json.loads(found[-1].split("RESULT ", 1)[1])
