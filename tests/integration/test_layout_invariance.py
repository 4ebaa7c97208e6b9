"""Same numbers whatever the layout: real DeepSpeed, ZeRO 1-3, 1 and 2 ranks, and how sequences are packed.

A token budget of one packs nothing, the largest packs all sequences of a rank. Where the learner takes its own
log-probs as proximal ones, recomputed ones give the same. One algorithm is trained in all layouts, and one of every
other kind (reference, KL in the reward and to go, sequence ratio, pairs, groups) in those that differ most.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.config import Exaone4TinyModel
from rlhf.models import prepare_model
from rlhf.weight_sync.transports import free_port

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.integration

Figures = dict[tuple[int, int, int, bool, str], list[list[float]]]


def figures(model: Path, ranks: int, device: str = "cpu") -> Figures:
    """(zero stage, ranks, token budget, recomputed, algorithm) -> (loss, gradient norm) of three steps."""
    port = str(free_port())
    command = [sys.executable, str(Path(__file__).with_name("layout_rank.py"))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), port, str(model), device],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(o[-3000:] for o in outputs)
    lines = [line.split("RESULT ", 1)[1] for line in outputs[0].splitlines() if "RESULT " in line]
    return {(z, r, b, p, name): values for z, r, b, p, name, values in map(json.loads, lines)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Exaone4TinyModel(kind="exaone4_tiny", hidden_size=32, intermediate_size=64, heads=2, kv_heads=1)
    return prepare_model(config, 0, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def all_figures(model: Path) -> Figures:
    return figures(model, 1) | figures(model, 2)


@pytest.mark.parametrize(
    ("algorithm", "layouts"),
    [
        ("sft", 6),
        ("grpo_icepop", 22),
        ("grpo", 10),
        ("rloo", 6),
        ("gspo", 6),
        ("agapo", 6),
        ("dpo", 6),
        ("grouper", 6),
    ],
)
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(all_figures, algorithm, layouts):
    ours = {key: values for key, values in all_figures.items() if key[4] == algorithm}
    assert len(ours) == layouts
    reference = ours[1, 1, 1, False, algorithm]
    for key, values in ours.items():
        for (loss, norm), (expected_loss, expected_norm) in zip(values, reference, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-5), key
            assert norm == pytest.approx(expected_norm, rel=1e-5, abs=1e-5), key
    assert len({round(norm, 6) for _, norm in reference}) == 3, "three steps must do three different things"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_losses_and_gradient_norms_of_a_cpu(model):
    on_cpu, on_gpu = figures(model, 1), figures(model, 1, "cuda")
    assert on_gpu.keys() == on_cpu.keys()
    for key, values in on_gpu.items():
        for found, expected in zip(values, on_cpu[key], strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), key
