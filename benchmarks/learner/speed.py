"""Trained tokens per second beside a bare PyTorch loop, and beside an older checkout of this project.

The bare loop has the same model, sequences, threads, precision and float32 masters. It pads micro-batches of rows
sorted by length, applies the head to the trained tokens alone, and returns their log-probs and entropy.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.isolated import REPOSITORY, finish, isolated, start_script
from benchmarks.learner.logprob_memory import naive_logprobs
from benchmarks.learner.samples import uniform_lengths, write_samples
from benchmarks.machine import matmul_gflops
from rlhf.config import Exaone4TinyModel, SmolLM2Model
from rlhf.models import policy_config, prepare_model
from rlhf.weight_sync.transports import free_port

RANK_PROCESS = Path(__file__).with_name("rank_process.py")
GSM8K_LENGTHS = (150, 300)
TINY_LENGTHS = (24, 72)
SHORT_LENGTHS = (16, 48)


def run(*, quick: bool, baseline: Path | None, **_: Any) -> dict[str, Any]:
    """Ratios to the bare loop in float32 for both models, in bfloat16 too, and to the checkout at `baseline`."""
    repeats = 3 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        cases = models(Path(folder))
        beside_torch = {
            f"{name}_{dtype}": isolated(beside_loop, case, dtype, repeats)
            for dtype, of_dtype in cases.items()
            for name, case in of_dtype.items()
        }
        figures = {f"learner_over_torch_{name}": beside_torch[f"{name}_float32"]["ratio"] for name in ("135m", "tiny")}
        result: dict[str, Any] = {"beside_torch": beside_torch, "figures": figures}
        if baseline is not None:
            older = {dtype: beside_older(of_dtype["135m"], dtype, baseline, quick) for dtype, of_dtype in cases.items()}
            figures |= {
                "update_speedup_fp32": older["float32"]["speedup"],
                "update_speedup_bf16": older["bfloat16"]["speedup"],
            }
            result["beside_older"] = older
    return result


def models(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By precision and name, the two models with their sequences: 16 of SmolLM2-135M, 128 of the tiny one.

    Without bfloat16 instructions a step of the others takes an hour in that precision, so that its sequences are few
    and short there.
    """
    tiny_config = Exaone4TinyModel(kind="exaone4_tiny", max_context_tokens=128)
    tiny = prepare_model(tiny_config, 0, folder / "tiny")
    smollm2 = prepare_model(SmolLM2Model(kind="smollm2_135m"), 0, folder / "smollm2")
    small = write_samples(folder / "small.npz", uniform_lengths(16, GSM8K_LENGTHS), 49_152, 0.5)
    many = write_samples(folder / "many.npz", uniform_lengths(128, TINY_LENGTHS), 272, 0.5)
    short = write_samples(folder / "short.npz", uniform_lengths(4, SHORT_LENGTHS), 49_152, 0.5)
    few = write_samples(folder / "few.npz", uniform_lengths(32, TINY_LENGTHS), 272, 0.5)
    emulated = matmul_gflops(torch.bfloat16) < matmul_gflops(torch.float32) / 4

    def cases(large_samples: Path, tiny_samples: Path, shortened: bool) -> dict[str, dict[str, Any]]:
        common = {"short": shortened}
        return {
            "135m": {"model": str(smollm2), "samples": str(large_samples), "context": 768, "token_budget": 1024}
            | common,
            "tiny": {"model": str(tiny), "samples": str(tiny_samples), "context": 128, "token_budget": 4096} | common,
        }

    long = cases(small, many, False)
    return {"float32": long, "bfloat16": cases(short, few, True) if emulated else long}


# --- the bare loop ----------------------------------------------------------------------------------------------------


def beside_loop(case: dict[str, Any], dtype: str, repeats: int) -> dict[str, Any]:
    """Both in one process, step by step in turn; runs in its own process."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}
    ours, bare = our_step(case, dtype, threads), BareLoop(case, dtype).step
    tokens = ours(), bare()
    assert tokens[0] == tokens[1]
    turns = [(_seconds(ours), _seconds(bare)) for _ in range(repeats)]
    ratios = sorted(theirs / mine for mine, theirs in turns)
    return {
        "tokens_per_s": tokens[0] / statistics.median(mine for mine, _ in turns),
        "torch_tokens_per_s": tokens[0] / statistics.median(theirs for _, theirs in turns),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "threads": threads,
    }


def our_step(case: dict[str, Any], dtype: str, threads: int) -> Callable[[], int]:
    from benchmarks.learner import rank_process

    task = rank_process.Task(
        rank=0,
        ranks=1,
        port=free_port(),
        threads=threads,
        model=case["model"],
        dtype=dtype,
        context=case["context"],
        samples=case["samples"],
        training={"token_budget": case["token_budget"]},
        steps=0,
        warm_up=0,
    )
    return rank_process.step_of_this_api(task, rank_process.run_config(task))


class BareLoop:
    """Forward, backward and AdamW in plain PyTorch."""

    def __init__(self, case: dict[str, Any], dtype: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        self._device = device
        config = policy_config(case["model"])
        model = AutoModelForCausalLM.from_pretrained(case["model"], config=config, dtype=getattr(torch, dtype))
        self._model = model.to(device)
        self._masters = [p.detach().float().clone().requires_grad_() for p in self._model.parameters()]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-6, weight_decay=0.0, fused=True)
        self._stored = np.load(case["samples"])
        self._budget = case["token_budget"]

    def step(self) -> int:
        trained = 0
        for token_ids, mask in self._micro_batches():
            hidden = self._model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
            logprobs, entropy = naive_logprobs(
                hidden[:, :-1][mask[:, 1:]], self._model.get_output_embeddings().weight, token_ids[mask]
            )
            assert entropy.shape == logprobs.shape
            (-logprobs.sum() / 1000).backward()
            trained += len(logprobs)
        self._update()
        return trained

    def _update(self) -> None:
        parameters = list(self._model.parameters())
        for master, parameter in zip(self._masters, parameters, strict=True):
            master.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self._masters, parameters, strict=True):
                parameter.copy_(master)

    def _micro_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows sorted by length, padded on the right; causal attention needs no mask for that."""
        offsets, prompts = self._stored["offsets"], self._stored["prompt_tokens"]
        lengths = np.diff(offsets)
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]])
            rows = order[start : start + max(1, self._budget // longest)]
            token_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros(len(rows), longest, dtype=torch.bool)
            for row, number in enumerate(rows):
                values = self._stored["token_ids"][offsets[number] : offsets[number + 1]]
                token_ids[row, : len(values)] = torch.from_numpy(values.astype(np.int64))
                mask[row, prompts[number] : len(values)] = True
            yield token_ids.to(self._device), mask.to(self._device)
            start += len(rows)


# --- an older checkout ------------------------------------------------------------------------------------------------


def beside_older(case: dict[str, Any], dtype: str, baseline: Path, quick: bool) -> dict[str, Any]:
    """Annotation and update of `experiment=gsm8k_smollm2`: one rollout step of 4 prompts x 4 samples, learners alone.

    The older checkout runs as its experiment says, two ranks of one thread; this one as its own does, one of two.
    """
    rounds = 1 if quick or case["short"] else 3
    steps = 1 if case["short"] else 2
    ratios, ours_s, older_s = [], [], []
    for _ in range(rounds):
        ours = timed_ranks(case, dtype, REPOSITORY, 1, {"token_budget": case["token_budget"]}, steps=steps)
        older = timed_ranks(case, dtype, baseline, 2, {"micro_batch_size": 4}, steps=steps)
        assert ours["trained_tokens"] == older["trained_tokens"]
        ratios.append(older["seconds"] / ours["seconds"])
        ours_s.append(ours["seconds"])
        older_s.append(older["seconds"])
    return {
        "speedup": statistics.median(ratios),
        "speedup_low": min(ratios),
        "seconds": statistics.median(ours_s),
        "older_seconds": statistics.median(older_s),
        "trained_tokens": ours["trained_tokens"],
    }


def timed_ranks(
    case: dict[str, Any],
    dtype: str,
    root: Path,
    ranks: int,
    training: dict[str, Any],
    *,
    steps: int = 2,
    device: str = "cpu",
) -> dict[str, Any]:
    """Median seconds of a step with all ranks, each in a process of its own; one step warms up.

    On a GPU also the highest memory of a rank.
    """
    cores, port = os.cpu_count() or 1, free_port()
    threads = max(1, cores // ranks)
    processes = []
    for rank in range(ranks):
        task = {
            "rank": rank,
            "ranks": ranks,
            "port": port,
            "threads": threads,
            "model": case["model"],
            "dtype": dtype,
            "context": case["context"],
            "samples": case["samples"],
            "training": training,
            "steps": steps,
            "warm_up": 1,
            "device": device,
        }
        command = [sys.executable, str(RANK_PROCESS), json.dumps(task)]
        processes.append(start_script(command, root=root, environment={"OMP_NUM_THREADS": str(threads)}))
    results = [finish(process) for process in processes]
    slowest = [max(values) for values in zip(*(result["seconds"] for result in results), strict=True)]
    found = {
        "seconds": statistics.median(slowest),
        "trained_tokens": sum(result["trained_tokens"] for result in results),
    }
    peaks = [result["peak_gib"] for result in results if "peak_gib" in result]
    return found | ({"peak_gib": max(peaks)} if peaks else {})


def _seconds(step: Callable[[], int]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
