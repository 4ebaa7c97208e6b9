"""What a user reads when a learner runs out of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.config import RunConfig
from rlhf.errors import OutOfMemoryError
from rlhf.training.memory import explained_memory


def run_config(**sections: Any) -> RunConfig:
    source = {"kind": "procedural"}
    stage = {"kind": "sft", "steps": 1, "optimizer": {"learning_rate": 1e-4}}
    return RunConfig.model_validate(
        {
            "experiment": "test",
            "model": {"kind": "exaone4_tiny", "max_context_tokens": 128},
            "data": {"train": source, "evaluation": source},
            "stages": {"sft": stage},
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            **sections,
        }
    )


def message(config: RunConfig, doing: str, error: BaseException) -> str:
    with pytest.raises(OutOfMemoryError) as caught, explained_memory(config, doing):
        raise error
    return str(caught.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), MemoryError()])
def test_an_update_names_checkpointing_the_budget_and_the_zero_stage(error: BaseException) -> None:
    text = message(run_config(), "update", error)
    assert text.startswith("learner update: out of memory.")
    for key in ("gradient_checkpointing=true", "token_budget from 4096 to 128", "zero_stage=3", "training.ranks"):
        assert key in text


def test_what_is_already_set_is_not_advised() -> None:
    training = {"zero_stage": 3, "gradient_checkpointing": True, "token_budget": 128}
    text = message(run_config(training=training), "update", MemoryError())
    for key in ("gradient_checkpointing", "token_budget", "zero_stage"):
        assert key not in text
    assert "max_context_tokens" in text


def test_loading_is_not_helped_by_smaller_batches() -> None:
    text = message(run_config(), "load_model", MemoryError())
    assert "zero_stage=3" in text
    assert "token_budget" not in text


def test_a_real_allocation_that_is_too_large_is_recognised() -> None:
    with pytest.raises(OutOfMemoryError, match="out of memory"), explained_memory(run_config(), "update"):
        torch.empty(1 << 60, dtype=torch.int8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explained_memory(run_config(), "update"):
        raise RuntimeError("shapes differ")
