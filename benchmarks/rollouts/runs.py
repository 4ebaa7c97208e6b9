"""Whole runs of the program, as a user starts them, with the memory that they took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from benchmarks.isolated import REPOSITORY

_LOOK_EVERY_S = 1.0


def launch(*arguments: str, checkout: Path = REPOSITORY) -> float:
    """Run launch.py. Returns the highest memory in GiB; raises RuntimeError when the run failed."""
    return watched([sys.executable, "launch.py", *arguments], checkout)[1]


def tiny_model(root: Path, *overrides: str) -> Path:
    """The quickstart's model after its SFT, from which RL can learn."""
    launch("experiment=algorithms_base", "tracking=local", f"run_root={root}", *overrides)
    return (root / "latest" / "policy").resolve()


def summary(root: Path) -> dict[str, Any]:
    """`summary.json` of the newest run below `root`."""
    found: dict[str, Any] = json.loads((root / "latest" / "summary.json").read_text())
    return found


def step_lines(root: Path) -> list[dict[str, Any]]:
    """The metrics of each RL step of the newest run below `root`."""
    lines = map(json.loads, (root / "latest" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "time/step_s" in line]


def watched(command: list[str], checkout: Path = REPOSITORY) -> tuple[str, float]:
    """What a command in a checkout printed, and the highest memory of its processes together in GiB.

    Raises RuntimeError with the end of its output when it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=checkout, env=environment, **pipes)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(_LOOK_EVERY_S):
            peak = max(peak, _proportional_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with status {process.returncode}:\n{output[-3000:]}")
    return output, peak / (1 << 30)


def _proportional_bytes(pid: int) -> int:
    """Memory of a process and its descendants, of shared pages each its share."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue  # it has ended
    except psutil.Error:
        pass
    return total
