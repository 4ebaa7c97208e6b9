"""Facts of the machine that a figure depends on, and memory of a process as the kernel counts it."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def facts() -> dict[str, Any]:
    """CPU, memory, versions, the speed of a matrix product in both precisions with all cores, and the GPU if any."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": named.get("model name", platform.processor()),
        "family": named.get("cpu family", ""),
        "flags": [flag for flag in _FLAGS if f" {flag} " in f"{named.get('flags', '')} "],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "torch": torch.__version__,
        "float32_gflops": round(matmul_gflops(torch.float32), 1),
        "bfloat16_gflops": round(matmul_gflops(torch.bfloat16), 1),
    }


def matmul_gflops(dtype: torch.dtype, size: int = 1024) -> float:
    """The fastest of three products of square matrices."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    fastest = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest / 1e9


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: what it allocated and touched, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """Highest anonymous memory while a block ran, in bytes."""

    def __init__(self) -> None:
        self.before = anonymous_bytes()
        self.highest = self.before

    @property
    def extra(self) -> int:
        """Bytes above what the process held before the block."""
        return self.highest - self.before


@contextmanager
def peak_memory(interval_s: float = 0.002) -> Iterator[Peak]:
    """Sample the anonymous memory of this process from a thread of its own."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(interval_s):
            peak.highest = max(peak.highest, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.highest = max(peak.highest, anonymous_bytes())
