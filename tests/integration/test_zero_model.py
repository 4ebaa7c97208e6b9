"""A model that is loaded in parts (ZeRO-3) is the model that is loaded whole: real DeepSpeed, 2 ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config import Exaone4TinyModel
from rlhf.models import prepare_model
from rlhf.weight_sync.transports import free_port

REPOSITORY = Path(__file__).parents[2]
RANKS = 2
LAYER = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"

pytestmark = pytest.mark.integration


def tiny(directory: Path, *, tied: bool) -> Path:
    # An odd width: the parts of most tensors do not come out even.
    sizes = {"hidden_size": 36, "intermediate_size": 51, "heads": 2, "kv_heads": 1, "layers": 4}
    config = Exaone4TinyModel(kind="exaone4_tiny", tie_word_embeddings=tied, **sizes)
    return prepare_model(config, 0, directory)


def changed(model: Path, directory: Path, change: Any) -> None:
    """A copy of `model` with other tensors: `change` gets and changes the dictionary of them."""
    shutil.copytree(model, directory)
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def experts(directory: Path) -> None:
    """A mixture of experts, whose files hold each expert apart and whose model holds them as one tensor."""
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    config = ExaoneMoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        sliding_window=16, n_group=1, topk_group=1,
        max_position_embeddings=128, mlp_layer_types=["dense", "sparse"],
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    ExaoneMoeForCausalLM(config).save_pretrained(directory)


def write_models(root: Path) -> None:
    untied, tied = tiny(root / "untied", tied=False), tiny(root / "tied", tied=True)
    experts(root / "experts")
    changed(tied, root / "tied_twice", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    changed(tied, root / "tied_head", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    changed(tied, root / "tied_apart", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    changed(untied, root / "half", lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    changed(untied, root / "missing", lambda t: (t.pop(LAYER), t.pop("lm_head.weight")))
    changed(untied, root / "unexpected", lambda t: t.update({"model.layers.9.extra": torch.zeros(2)}))
    changed(untied, root / "old_buffer", lambda t: t.update({"model.rotary_emb.inv_freq": torch.zeros(9)}))
    changed(untied, root / "shape", lambda t: t.update({LAYER: t[LAYER][:-1].clone()}))
    shutil.copytree(untied, root / "truncated")
    file = root / "truncated" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The name of each model -> differences for each dtype, or the problems; equal on both ranks."""
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    command = [sys.executable, str(Path(__file__).with_name("zero_model_rank.py"))]
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), port, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [p.returncode for p in processes] == [0] * RANKS, "\n".join(o[-3000:] for o in outputs)
    results = [json.loads(output.split("RESULT ", 1)[1].splitlines()[0]) for output in outputs]
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize("model", ["untied", "tied", "tied_twice", "tied_head", "half", "old_buffer", "experts"])
def test_a_model_in_parts_equals_the_whole_one_bit_for_bit_in_both_dtypes(found, model):
    assert found[model] == [[], []]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("missing", f"Missing: {LAYER}, lm_head.weight"),
        ("unexpected", "More: model.layers.9.extra"),
        ("shape", f"{LAYER} is (50, 36) in the files and (51, 36) in the model"),
        ("truncated", f"{WEIGHTS} ("),
        ("tied_apart", "model.embed_tokens.weight and lm_head.weight are one tensor in the model and differ"),
    ],
)
def test_files_that_do_not_fit_the_model_are_named_on_every_rank(found, model, expected):
    problems = found[model]
    assert len(problems) == 1
    assert expected in problems[0]
    assert problems[0].startswith("model.path = ")


def test_training_does_not_notice_how_the_model_was_loaded(found):
    losses = found["losses"]
    assert losses["partitioned"] == losses["whole"]
    assert len(set(losses["whole"])) == 3


def test_training_under_offload_gives_the_same_losses(found):
    assert found["losses"]["offloaded"] == pytest.approx(found["losses"]["partitioned"], rel=1e-5)


# --- optimisers ---------------------------------------------------------------------------------------

ASK = """
import json
from rlhf.config import TrainingConfig
from rlhf.training.zero_model import available_optimizer

offloaded = TrainingConfig(zero_stage=2, offload_optimizer=True)
print("RESULT", json.dumps([available_optimizer(t, "cpu") for t in (TrainingConfig(), offloaded)]))
"""


def available(**environment: str) -> list[list[str | None]]:
    """[optimiser, reason], without and with offloading, of a process with this environment."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=REPOSITORY,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ", 1)[1])


def test_without_a_compiler_torchs_optimiser_takes_over_and_the_reason_is_told(tmp_path):
    plain, offloaded = available(PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert plain == ["torch AdamW (fused)", None]
    assert offloaded[0] == "torch AdamW (fused)"
    assert offloaded[1].startswith("DeepSpeedCPUAdam cannot be compiled here: ")
    assert "ninja" in offloaded[1].lower()


def test_a_lock_that_a_killed_compilation_left_behind_is_not_waited_for(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    _, offloaded = available(TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert offloaded[0] == "torch AdamW (fused)"
    assert f"{lock} is 60 minutes old" in offloaded[1]
