"""Peak memory of a rank under ZeRO-3: after loading a model from its files, and over full optimiser steps.

    peak = bytes per parameter x parameters / ranks + bytes per element x (layer + largest tensor) + constant

Float32: a parameter costs 20 bytes spread over the ranks: the weight, its gradient, the master copy and two moments.
What a rank holds whole is a decoder layer, or the embedding, with their gradients and the buffers that collectives use.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.isolated import run_zero3_ranks
from benchmarks.machine import GIB, anonymous_bytes, peak_memory
from rlhf.weight_sync.transports import free_port

# name -> (width, layers); vocabulary 16,384, untied head
MODELS = {"0.1 B": (768, 10), "0.3 B": (1024, 22), "0.6 B": (1280, 28)}
QUICK = {"0.02 B": (384, 4), "0.04 B": (512, 8), "0.1 B": (768, 10)}
RANKS = (1, 2, 3)
QUICK_RANKS = (1, 2)
VOCABULARY = 16_384
TOKENS = 256
STEPS = 2
LARGE = {"parameters": 32_000_000_000, "layer": 450_000_000, "largest": 5120 * 153_600}
"""A dense 32 B: 64 layers of width 5,120, vocabulary 153,600."""


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """One row for each model and number of ranks, the fit over them, and what it says of 32 B parameters."""
    models, ranks = (QUICK, QUICK_RANKS) if quick else (MODELS, RANKS)
    rows = []
    for name, (width, layers) in models.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            sizes = write_model(path, width, layers)
            rows += [{"model": name, "ranks": count, **sizes, **measure(path, count)} for count in ranks]
    found = fit(rows)
    figures = {"zero3_load_error": found["largest_deviation"]}
    return {"rows": rows, "fit": found, "figures": figures}


def write_model(path: Path, width: int, layers: int) -> dict[str, int]:
    """Random float32 weights; returns the elements of the model, of its largest tensor and of a layer."""
    from transformers import Exaone4Config, Exaone4ForCausalLM

    from rlhf.training.zero_settings import ParameterSizes

    config = Exaone4Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        sliding_window=None,
        layer_types=["full_attention"] * layers,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = Exaone4ForCausalLM(config)
    model.save_pretrained(path)
    sizes = ParameterSizes.of({name: tuple(value.shape) for name, value in model.named_parameters()})
    return {"parameters": sizes.total, "largest": sizes.largest, "layer": sizes.layer}


def measure(model: Path, ranks: int) -> dict[str, float]:
    """GiB above an empty process of the rank that holds most: after loading, and at most over the steps."""
    found = run_zero3_ranks("benchmarks.learner.zero3_load", ranks, [free_port(), str(model)])
    return {key: max(one[key] for one in found) for key in ("loaded_gib", "peak_gib")}


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least squares over the rows, its largest relative deviation, and 32 B on 8, 16 and 64 ranks."""
    terms = np.array([_terms(row["parameters"], row["ranks"], row["layer"] + row["largest"]) for row in rows])
    peaks = np.array([row["peak_gib"] * GIB for row in rows])
    coefficients, *_ = np.linalg.lstsq(terms, peaks, rcond=None)
    deviation = np.abs(terms @ coefficients - peaks) / peaks
    large = {
        ranks: float(coefficients @ _terms(LARGE["parameters"], ranks, LARGE["layer"] + LARGE["largest"]) / GIB)
        for ranks in (8, 16, 64)
    }
    return {
        "bytes_per_parameter_share": float(coefficients[0]),
        "bytes_per_whole_element": float(coefficients[1]),
        "constant_gib": float(coefficients[2] / GIB),
        "largest_deviation": float(deviation.max()),
        "gib_of_32_b_float32_by_ranks": large,
    }


def _terms(parameters: int, ranks: int, whole: int) -> np.ndarray:
    return np.array([parameters / ranks, whole, 1.0])


def one_rank(rank: int, ranks: int, port: int, model: str) -> dict[str, float]:
    """Runs in its own process."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(ranks)}
    from rlhf.batches.packing import WorkModel, plan_batch
    from rlhf.batches.ragged import supervised_sequences
    from rlhf.config import HuggingFaceModel, OptimizerConfig, TrainingConfig
    from rlhf.samples import TokenizedExample
    from rlhf.training.deepspeed_engine import DeepSpeedEngine, join_process_group
    from rlhf.training.token_model import Pack

    torch.set_num_threads(1)
    join_process_group(rank, ranks, "127.0.0.1", port, "cpu", 1800.0)
    chosen = HuggingFaceModel(kind="hf", path=model, dtype="float32", max_context_tokens=TOKENS)
    training = TrainingConfig(ranks=ranks, zero_stage=3, gradient_checkpointing=True)
    tokens = np.random.default_rng(0).integers(10, VOCABULARY - 10, TOKENS).astype(np.int32)
    examples = [TokenizedExample(tokens, np.arange(TOKENS) > 0)] * ranks
    batch = supervised_sequences(examples, lambda count: 1.0 / count)
    share = plan_batch(batch, ranks, TOKENS, WorkModel()).shares(batch)[rank]
    with peak_memory() as peak:
        engine = DeepSpeedEngine(Path(model), chosen, training, "cpu")
        engine.configure_optimizer(OptimizerConfig(learning_rate=1e-6), fresh=True)
        loaded = anonymous_bytes() - peak.before
        for _ in range(STEPS):
            [part] = share.micro_batches()
            logprobs, _ = engine.forward(Pack.of(part, engine.device), 1.0)
            engine.backward(-logprobs.sum() / TOKENS, last=True)
            engine.step(1e-6)
    return {"loaded_gib": loaded / GIB, "peak_gib": peak.extra / GIB}


if __name__ == "__main__":
    print("RESULT " + json.dumps(one_rank(*json.loads(sys.argv[1]))), flush=True)
