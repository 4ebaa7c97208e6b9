"""One rank of the test of partitioned loading: loads each model of a directory and prints what it found."""

import json
import os
import sys
from pathlib import Path
from typing import Any

RANK, RANKS, PORT, MODELS = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402

from rlhf.config import HuggingFaceModel, OptimizerConfig, TrainingConfig  # noqa: E402
from rlhf.errors import ConfigError  # noqa: E402
from rlhf.models import load_policy  # noqa: E402
from rlhf.training.deepspeed_engine import join_process_group  # noqa: E402
from rlhf.training.model_files import ModelFiles  # noqa: E402
from rlhf.training.zero_model import partitioned_model  # noqa: E402
from rlhf.training.zero_settings import OptimizerName, ParameterSizes, zero_settings  # noqa: E402

TRAINED = "tied"
"""The model that also takes an optimiser step."""


def settings(path: Path, model: HuggingFaceModel, **training: Any) -> dict[str, Any]:
    files = ModelFiles(path)
    sizes = ParameterSizes.of({name: files.shape(name) for name in files.names})
    stage = TrainingConfig(zero_stage=3, ranks=RANKS, **training)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    # DeepSpeed's own optimiser for offloading has to be compiled, which takes longer than this test.
    return zero_settings(model, stage, optimizer, "cpu", sizes, adam=OptimizerName.TORCH_FUSED)


def load(path: Path, model: HuggingFaceModel, chosen: dict[str, Any]) -> Any:
    return partitioned_model(path, model, chosen, gradient_checkpointing=True, attention="sdpa")


def differences(path: Path, dtype: str) -> list[str]:
    """What differs between the partitioned model and one that was loaded whole; and that it is partitioned."""
    import deepspeed

    model = HuggingFaceModel(kind="hf", path=str(path), dtype=dtype)
    policy = load(path, model, settings(path, model))
    whole = load_policy(path, dtype, gradient_checkpointing=True)
    found = []
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    mine = dict(policy.named_parameters(remove_duplicate=False))
    found += [f"parameters {set(parameters) ^ set(mine)}"] if set(parameters) != set(mine) else []
    for name, parameter in mine.items():
        held = parameter.ds_tensor.numel() * RANKS
        if parameter.numel() or not 0 <= held - parameter.ds_numel < RANKS:
            found.append(f"{name} is not partitioned")
        with deepspeed.zero.GatheredParameters([parameter]):
            if parameter.dtype != parameters[name].dtype or not torch.equal(parameter, parameters[name]):
                found.append(name)
    for name, buffer in whole.named_buffers():
        other = policy.get_buffer(name)
        if other.dtype != buffer.dtype or not torch.equal(other, buffer):
            found.append(name)
    for question in ("training", "is_gradient_checkpointing"):
        if getattr(policy, question) != getattr(whole, question):
            found.append(question)
    if policy.generation_config.to_dict() != whole.generation_config.to_dict():
        found.append("generation_config")
    if policy.config.to_dict() | {"dtype": None} != whole.config.to_dict() | {"dtype": None}:
        found.append("config")
    return found


def losses(path: Path, *, partitioned: bool, **training: Any) -> list[float]:
    """Losses of three optimiser steps."""
    import deepspeed

    model = HuggingFaceModel(kind="hf", path=str(path), dtype="float32")
    chosen = settings(path, model, **training)
    policy = load(path, model, chosen) if partitioned else load_policy(path, "float32")
    engine, *_ = deepspeed.initialize(model=policy, model_parameters=policy.parameters(), config=chosen)
    token_ids = torch.arange(40)[None] + 100
    out = []
    for _ in range(3):
        logits = engine(input_ids=token_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], token_ids[0, 1:])
        engine.backward(loss)
        engine.step()
        out.append(loss.item())
    engine.destroy()
    return out


def outcome(path: Path) -> Any:
    try:
        return [differences(path, dtype) for dtype in ("float32", "bfloat16")]
    except ConfigError as error:
        return error.problems


def main() -> None:
    torch.set_num_threads(1)
    join_process_group(RANK, RANKS, "127.0.0.1", PORT, "cpu", 60.0)
    results = {path.name: outcome(path) for path in sorted(MODELS.iterdir())}
    results["losses"] = {
        "partitioned": losses(MODELS / TRAINED, partitioned=True),
        "whole": losses(MODELS / TRAINED, partitioned=False),
        "offloaded": losses(MODELS / TRAINED, partitioned=True, offload_optimizer=True, offload_parameters=True),
    }
    print("RESULT", json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
