"""What decides the bits of a learner's arithmetic besides its inputs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlhf.config import RunConfig

_PACKAGES = ("torch", "deepspeed", "transformers")


def machine(config: RunConfig) -> dict[str, Any]:
    """The processor, its threads, the libraries and the layout of this rank. JSON.

    Ranks with equal values train the same rows to the same bits.
    """
    training = config.training
    return {
        "processor": torch.cuda.get_device_name() if config.cluster.device == "cuda" else _cpu_model(),
        "threads": torch.get_num_threads(),
        "ranks": training.ranks,
        "zero_stage": training.zero_stage,
        **{package: version(package) for package in _PACKAGES},
    }


def _cpu_model() -> str:
    # platform.processor() is empty on most Linux distributions.
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return fields[0] if fields else "unknown"
