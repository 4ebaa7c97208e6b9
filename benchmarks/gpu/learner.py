"""The learner with the real EXAONE-4.0-1.2B architecture in bfloat16 and random weights, on one GPU."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.isolated import REPOSITORY, isolated
from benchmarks.learner.full_size import ARCHITECTURE, write_model
from benchmarks.learner.logprob_memory import FORMS
from benchmarks.learner.samples import long_tailed_lengths, write_samples
from benchmarks.learner.speed import BareLoop, timed_ranks
from benchmarks.machine import GIB

LOSS_TOKENS = (4096, 16_384, 65_536)
NAIVE_TOKENS = LOSS_TOKENS[:2]
SEQUENCES, TOKEN_BUDGET = 128, 8192
LONG = (8192, 32_768, 65_536)
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero_1": {},
    "zero_3": {"zero_stage": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "offloaded_optimizer": {"offload_optimizer": True},
}


def run_loss(**_: Any) -> dict[str, Any]:
    rows = [isolated(loss, tokens, "chunked") for tokens in LOSS_TOKENS]
    naive = [isolated(loss, tokens, "naive") for tokens in NAIVE_TOKENS]
    return {
        "chunked": rows,
        "naive": naive,
        "figures": {
            "loss_memory_growth": rows[-1]["extra_gib"] / rows[0]["extra_gib"] - 1.0,
            "loss_seconds_over_naive": rows[1]["seconds"] / naive[1]["seconds"],
        },
    }


def run_steps(*, quick: bool, **_: Any) -> dict[str, Any]:
    lengths = long_tailed_lengths(SEQUENCES)
    with model_folder(quick) as (folder, parameters, layers):
        samples = write_samples(folder / "mixed.npz", lengths, ARCHITECTURE["vocab_size"], 0.25)
        mixed = case(folder, samples, 4096)
        steps = {name: step(mixed, {"token_budget": TOKEN_BUDGET, **layout}) for name, layout in LAYOUTS.items()}
        bare = isolated(bare_step, mixed)
    for row in (*steps.values(), bare):
        row["teraflops"] = flops(parameters, layers, lengths) / row["seconds"] / 1e12
    reached = isolated(matmul_teraflops)
    return {
        "tokens": int(lengths.sum()),
        "parameters": parameters,
        "steps": steps,
        "bare": bare,
        "matmul_teraflops": reached,
        "figures": {
            "learner_over_torch": bare["seconds"] / steps["zero_1"]["seconds"],
            "step_teraflops": steps["zero_1"]["teraflops"],
            "step_over_matmul": steps["zero_1"]["teraflops"] / reached,
        },
    }


def run_long(*, quick: bool, **_: Any) -> dict[str, Any]:
    """Four sequences of one length, each a micro-batch of its own, with gradient checkpointing."""
    rows = []
    with model_folder(quick) as (folder, parameters, layers):
        for tokens in LONG[:1] if quick else LONG:
            lengths = np.array([tokens] * 4)
            samples = write_samples(folder / f"{tokens}.npz", lengths, ARCHITECTURE["vocab_size"], 0.01)
            found = step(case(folder, samples, tokens), {"gradient_checkpointing": True, "token_budget": tokens})
            speed = flops(parameters, layers, lengths) / found["seconds"] / 1e12
            rows.append({"tokens": tokens, "teraflops": speed, **found})
    return {"rows": rows, "figures": {f"peak_gib_{row['tokens']}": row["peak_gib"] for row in rows}}


def run_weights(*, quick: bool, **_: Any) -> dict[str, Any]:
    with model_folder(quick) as (folder, _parameters, _layers):
        rows = {f"zero_{stage}": isolated(pass_over_weights, str(folder / "model"), stage) for stage in (1, 3)}
    return {
        "rows": rows,
        "figures": {f"weights_gib_per_s_{name}": row["gib"] / row["seconds"] for name, row in rows.items()},
    }


@contextmanager
def model_folder(quick: bool) -> Iterator[tuple[Path, int, int]]:
    """(folder with the model below `model`, parameters, layers)."""
    layers = 4 if quick else ARCHITECTURE["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), isolated(write_model, str(Path(folder) / "model"), layers, "cuda"), layers


def case(folder: Path, samples: Path, context: int) -> dict[str, Any]:
    return {"model": str(folder / "model"), "samples": str(samples), "context": context, "token_budget": TOKEN_BUDGET}


def step(chosen: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Annotation and one optimiser step of the program's learner."""
    return timed_ranks(chosen, "bfloat16", REPOSITORY, 1, training, steps=4, device="cuda")


def flops(parameters: int, layers: int, lengths: np.ndarray) -> float:
    """Of a forward and backward pass: 6 a parameter and token, and causal attention.

    What gradient checkpointing computes twice counts once. Head and embedding are one tensor.
    """
    width = ARCHITECTURE["num_attention_heads"] * ARCHITECTURE["head_dim"]
    return float(6 * parameters * lengths.sum() + 6 * layers * width * np.square(lengths.astype(float)).sum())


# --- each in a process of its own -------------------------------------------------------------------------------------


def loss(tokens: int, form: str) -> dict[str, Any]:
    """Log-probs, entropy and gradients of `tokens` tokens; memory beyond that of inputs and gradients."""
    width, vocabulary = ARCHITECTURE["hidden_size"], ARCHITECTURE["vocab_size"]
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, width, **like).requires_grad_()
    weight = (torch.randn(vocabulary, width, **like) * width**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    seconds = []
    for _ in range(3):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        logprobs, entropy = FORMS[form](hidden, weight, targets)
        logprobs.sum().backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        assert entropy.shape == logprobs.shape
        del logprobs, entropy
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    return {"tokens": tokens, "form": form, "extra_gib": extra / GIB, "seconds": min(seconds)}


def bare_step(chosen: dict[str, Any]) -> dict[str, Any]:
    """The step of a plain PyTorch loop with padded rows."""
    loop = BareLoop(chosen, "bfloat16", "cuda")
    seconds, tokens = [], 0
    for _ in range(6):
        started = time.perf_counter()
        tokens = loop.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / GIB
    return {"seconds": statistics.median(seconds[1:]), "trained_tokens": tokens, "peak_gib": peak}


def pass_over_weights(model: str, zero_stage: int) -> dict[str, float]:
    """Seconds to gather, copy and hash all weights, as a device-to-device weight sync reads them."""
    from rlhf.config import HuggingFaceModel, TrainingConfig
    from rlhf.training.deepspeed_engine import DeepSpeedEngine, join_process_group
    from rlhf.weight_sync.source import ZeroWeightSource
    from rlhf.weight_sync.transports import free_port

    join_process_group(0, 1, "127.0.0.1", free_port(), "cuda", 600.0)
    chosen = HuggingFaceModel(kind="hf", path=model, dtype="bfloat16", max_context_tokens=1024)
    source = ZeroWeightSource(DeepSpeedEngine(Path(model), chosen, TrainingConfig(zero_stage=zero_stage), "cuda"))
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _name, _tensor in source:
            pass
        assert len(source.digests) == len(source.metadata())
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "gib": source.size_bytes / GIB}


def matmul_teraflops(size: int = 8192) -> float:
    """The fastest of twelve bfloat16 products: what this card reaches."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    fastest = float("inf")
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest / 1e12
