"""Peak memory of log-probs, entropy and their backward pass by vocabulary and number of tokens.

Each case runs in a process of its own. `extra` is the peak beyond what the process held before, less the gradients of
hidden states and of the output head, which any method needs. The naive form computes all logits at once.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.isolated import isolated
from benchmarks.machine import GIB, peak_memory
from rlhf.losses.logprobs import head_logprobs

WIDTH = 512
VOCABULARIES = (102_400, 153_600)
TOKENS = (2048, 4096, 8192, 16_384)
NAIVE_LIMIT = 12 * GIB
"""The naive form runs where its five tables of float32 logits fit."""


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """All cases, and by how much the extra memory grows from the second to the last number of tokens."""
    tokens = TOKENS[:2] + TOKENS[2:] if not quick else (512, 1024, 2048, 4096)
    vocabularies = VOCABULARIES if not quick else (16_384,)
    rows = [_case(vocabulary, count) for vocabulary in vocabularies for count in tokens]
    growth = {
        vocabulary: _growth([row for row in rows if row["vocabulary"] == vocabulary]) for vocabulary in vocabularies
    }
    return {"cases": rows, "growth": growth, "figures": {"loss_memory_growth": max(growth.values())}}


def _case(vocabulary: int, tokens: int) -> dict[str, Any]:
    ours = isolated(measure, vocabulary, tokens, "chunked")
    naive_bytes = 5 * 4 * vocabulary * tokens
    row = {"vocabulary": vocabulary, "tokens": tokens, "extra_gib": ours["extra_gib"], "seconds": ours["seconds"]}
    if naive_bytes <= NAIVE_LIMIT:
        naive = isolated(measure, vocabulary, tokens, "naive")
        return row | {"naive_gib": naive["extra_gib"], "naive_seconds": naive["seconds"]}
    return row | {"naive_gib_extrapolated": naive_bytes / GIB}


def _growth(rows: list[dict[str, Any]]) -> float:
    """Relative growth of the extra memory from the second to the last case, 4 times the tokens."""
    return rows[-1]["extra_gib"] / rows[1]["extra_gib"] - 1.0


def measure(vocabulary: int, tokens: int, form: str) -> dict[str, float]:
    """Runs in its own process."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH).requires_grad_()
    weight = (torch.randn(vocabulary, WIDTH) * WIDTH**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    _warm()
    started = time.perf_counter()
    with peak_memory() as peak:
        logprobs, entropy = FORMS[form](hidden, weight, targets)
        logprobs.sum().backward()
        assert entropy.shape == logprobs.shape
    needed = hidden.nbytes + weight.nbytes
    return {"extra_gib": (peak.extra - needed) / GIB, "seconds": time.perf_counter() - started}


def _warm() -> None:
    """The threads and buffers of a first matrix product are not the loss's."""
    small = torch.randn(64, 64, requires_grad=True)
    (small @ small).sum().backward()


def naive_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, as a plain PyTorch loop would."""
    table = torch.log_softmax((hidden @ weight.T).float(), -1)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(-1)
    return table.gather(-1, targets[:, None]).squeeze(-1), entropy


FORMS = {"chunked": head_logprobs, "naive": naive_logprobs}
