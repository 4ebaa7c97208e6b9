"""Loss and gradients of one long sequence through the real EXAONE-4.0-1.2B architecture, ZeRO-3 on two ranks.

Weights are random bfloat16. No optimiser step follows, so there are no moments; the gradients are whole.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.isolated import run_zero3_ranks
from benchmarks.machine import GIB, peak_memory
from rlhf.weight_sync.transports import free_port

TOKENS = 8192
RANKS = 2
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 65_536,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 30,
    "tie_word_embeddings": True,
    "use_cache": False,
}
"""As published with EXAONE-4.0-1.2B."""


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """Seconds, and the peak of the anonymous memory of both ranks together."""
    tokens, layers = (1024, 4) if quick else (TOKENS, ARCHITECTURE["num_hidden_layers"])
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(Path(folder) / "model", layers)
        arguments = [free_port(), str(Path(folder) / "model"), tokens]
        ranks = run_zero3_ranks("benchmarks.learner.full_size", RANKS, arguments)
    return {
        "parameters": parameters,
        "tokens": tokens,
        "ranks": ranks,
        "figures": {
            "full_size_peak_gib": sum(rank["peak_gib"] for rank in ranks),
            "full_size_seconds": max(rank["seconds"] for rank in ranks),
        },
    }


def write_model(path: Path | str, layers: int, device: str = "cpu") -> int:
    """Random bfloat16 weights in shards, made on `device`; returns the number of parameters."""
    from transformers import Exaone4Config, Exaone4ForCausalLM

    types = ["full_attention"] * layers
    config = Exaone4Config(**ARCHITECTURE | {"num_hidden_layers": layers, "layer_types": types})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Exaone4ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path, max_shard_size="1GB")
    return sum(parameter.numel() for parameter in model.parameters())


def one_rank(rank: int, ranks: int, port: int, model: str, tokens: int) -> dict[str, Any]:
    """Runs in its own process. Rank 0 has the sequence; the other takes part in the collectives."""
    from rlhf.batches.packing import Share
    from rlhf.batches.ragged import supervised_sequences
    from rlhf.config import HuggingFaceModel, TrainingConfig
    from rlhf.samples import TokenizedExample
    from rlhf.training.deepspeed_engine import DeepSpeedEngine, join_process_group
    from rlhf.training.token_model import Pack

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(ranks)}
    torch.set_num_threads(os.cpu_count() or 1 if rank == 0 else 1)
    join_process_group(rank, ranks, "127.0.0.1", port, "cpu", 7200.0)
    chosen = HuggingFaceModel(kind="hf", path=model, dtype="bfloat16", max_context_tokens=tokens)
    training = TrainingConfig(ranks=ranks, zero_stage=3, gradient_checkpointing=True)
    token_ids = np.random.default_rng(0).integers(10, 100_000, tokens).astype(np.int32)
    example = TokenizedExample(token_ids, np.arange(tokens) > 0)
    share = Share(supervised_sequences([example], lambda count: 1.0 / count), (1 if rank == 0 else 0,))
    with peak_memory() as peak:
        engine = DeepSpeedEngine(Path(model), chosen, training, "cpu")
        started = time.perf_counter()
        [part] = share.micro_batches()
        logprobs, entropy = engine.forward(Pack.of(part, engine.device), 1.0)
        loss = -logprobs.sum() / tokens
        engine.backward(loss, last=True)
        seconds = time.perf_counter() - started
    return {
        "loss": loss.item(),
        "entropy": entropy.mean().item() if len(entropy) else 0.0,
        "seconds": seconds,
        "peak_gib": peak.highest / GIB,
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(one_rank(*json.loads(sys.argv[1]))), flush=True)
