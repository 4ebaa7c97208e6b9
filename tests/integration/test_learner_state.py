"""A learner that goes on from its saved state makes the same bits as one that was never interrupted: real DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import Exaone4TinyModel
from rlhf.models import prepare_model
from rlhf.training.model_files import ModelFiles
from rlhf.weight_sync.transports import free_port

REPOSITORY = Path(__file__).parents[2]
RANKS = 2

pytestmark = pytest.mark.integration


def outcomes(model: Path, directory: Path, what: str) -> list[list[list[object]]]:
    """For each rank (ZeRO stage, dtype, losses, digests of its masters) of every layout."""
    command, port = [sys.executable, str(Path(__file__).with_name("resume_rank.py"))], str(free_port())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), port, str(model), str(directory), what], env=environment, **pipes
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(o[-3000:] for o in outputs)
    return [
        [json.loads(line.split("RESULT ", 1)[1]) for line in output.splitlines() if "RESULT " in line]
        for output in outputs
    ]


def test_a_learner_goes_on_bit_for_bit_in_every_zero_stage_and_precision(tmp_path):
    config = Exaone4TinyModel(kind="exaone4_tiny", hidden_size=32, intermediate_size=64, heads=2, kv_heads=1)
    model = prepare_model(config, 0, tmp_path / "tiny")
    unbroken = outcomes(model, tmp_path / "state", "save")
    resumed = outcomes(model, tmp_path / "state", "load")
    assert [len(of_rank) for of_rank in unbroken] == [6] * RANKS
    assert resumed == unbroken
    # No tensor is left out of the proof: each has its digest on the rank or the ranks that hold a part of it.
    for of_layout in zip(*unbroken, strict=True):
        named = {name for *_, digests in of_layout for name in digests}
        assert named == set(ModelFiles(model).names)
