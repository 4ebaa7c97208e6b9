"""DeepSpeed's configuration, derived from ours and from the size of the model.

DeepSpeed's defaults fit a model of some ten billion parameters: a reduction bucket alone is 500
million elements on every rank. Here every buffer follows from the model, so that the memory of a
rank is its share of the model states, one layer, and buffers that are no larger than a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

from rlhf.config import ModelConfig, OptimizerConfig, TrainingConfig
from rlhf.weight_sync.source import layer_groups

MAX_BUCKET = 50_000_000
"""Elements of one collective: 100 MB in bfloat16. A larger one is no faster and takes memory."""

MIN_BUCKET = 2**16
"""Elements of one collective of a tiny model: enough for several of its tensors."""

MAX_PERSISTENT = 100_000
"""Elements of the largest parameter that stays whole on every rank: gathering costs more there."""

BUCKET_MULTIPLE = 1024  # DeepSpeed wants an even number of elements


@dataclass(frozen=True)
class ParameterSizes:
    """Elements of a model: all of it, its largest tensor, and its largest decoder layer."""

    total: int
    largest: int
    layer: int

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> ParameterSizes:
        """Measure a model by the whole shapes of its parameters, a tied one under one name."""
        sizes = {name: prod(shape) for name, shape in shapes.items()}
        numbered = [group for group in layer_groups(list(sizes)) if _has_number(group[0])]
        largest = max(sizes.values())
        layers = (sum(sizes[name] for name in group) for group in numbered)
        return cls(sum(sizes.values()), largest, max(layers, default=largest))


def _has_number(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


class OptimizerName(StrEnum):
    """The implementations of AdamW. The optimiser's update is the same in all of them."""

    DEEPSPEED_CPU = "DeepSpeedCPUAdam"
    DEEPSPEED_FUSED = "FusedAdam"
    TORCH_FUSED = "torch AdamW (fused)"


def optimizer_name(training: TrainingConfig, device: str) -> OptimizerName:
    """Choose the implementation for the place where the optimiser runs.

    DeepSpeed's own are compiled at first use; see `zero_model.build_problem`.
    """
    if training.offload_optimizer:
        return OptimizerName.DEEPSPEED_CPU
    if device == "cuda":
        return OptimizerName.DEEPSPEED_FUSED
    return OptimizerName.TORCH_FUSED


def zero_settings(
    model: ModelConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig | None,
    device: str,
    parameters: ParameterSizes,
    *,
    adam: OptimizerName | None = None,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a model that is trained.

    Without `optimizer` its settings have neutral values, for an engine whose stages bring their
    own. `adam` replaces the implementation that `optimizer_name` chooses, for a machine where that
    one cannot be built.
    """
    zero = _zero(training, device, parameters)
    if training.offload_optimizer:
        zero["offload_optimizer"] = _offload(device)
    return {
        **_common(model, zero),
        "gradient_clipping": optimizer.max_grad_norm if optimizer is not None else 1.0,
        # Else DeepSpeed refuses torch's AdamW under offload, the substitute for its own.
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": _adamw(optimizer, adam or optimizer_name(training, device)),
    }


def frozen_settings(
    model: ModelConfig, training: TrainingConfig, device: str, parameters: ParameterSizes
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a partitioned model for forward passes only (ZeRO-3)."""
    zero = _zero(training.model_copy(update={"zero_stage": 3}), device, parameters)
    return _common(model, zero)


def memory_environment(training: TrainingConfig) -> dict[str, str]:
    """Return environment variables for the processes of the ranks, to be set before they start.

    glibc gives freed blocks back to the system from 128 KiB on, and raises that limit up to 32 MiB
    as it meets larger ones. A rank that gathers and frees every layer then peaks a third higher or
    more. Setting the limit keeps it where it starts. The page faults cost a small model a fifth of
    its CPU time, so only ZeRO-3, which is chosen for memory, does that.
    """
    return {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)} if training.zero_stage == 3 else {}


def _common(model: ModelConfig, zero: dict[str, Any]) -> dict[str, Any]:
    return {
        # Micro-batches are counted by the learner, which knows how many this step has.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


def _adamw(optimizer: OptimizerConfig | None, adam: OptimizerName) -> dict[str, Any]:
    params: dict[str, Any] = {"lr": 0.0}
    if optimizer is not None:
        params = {
            "lr": optimizer.learning_rate,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        }
    if adam is OptimizerName.TORCH_FUSED:
        # The fused kernel needs no temporary tensors, on the CPU too.
        params |= {"torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": params}


def _offload(device: str) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": device == "cuda"}


def _zero(training: TrainingConfig, device: str, parameters: ParameterSizes) -> dict[str, Any]:
    """The section on ZeRO: stage, buffers and what is overlapped."""
    bucket = _bucket(parameters)
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        # Gradients are copied into one buffer as they arrive: device memory stays unfragmented.
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
    }
    if training.zero_stage == 3:
        zero |= _gathering(training, device, parameters)
    else:
        zero["allgather_bucket_size"] = bucket
    return zero


def _gathering(training: TrainingConfig, device: str, parameters: ParameterSizes) -> dict[str, Any]:
    """Limits on what ZeRO-3 holds whole at once, and on what the optimiser updates at a time."""
    bucket = _bucket(parameters)
    settings: dict[str, Any] = {
        # Without it autograd keeps the gathered weights of the whole forward pass.
        "memory_efficient_linear": True,
        # A CPU has no copy engine: fetching before it is needed costs memory and gains nothing.
        "overlap_comm": device == "cuda",
        "stage3_prefetch_bucket_size": bucket if device == "cuda" else 0,
        "stage3_max_live_parameters": parameters.layer + parameters.largest,
        # With gradient checkpointing a layer stays between its recomputation and its backward.
        "stage3_max_reuse_distance": parameters.layer,
        # Norms and biases stay whole, matrices do not.
        "stage3_param_persistence_threshold": min(MAX_PERSISTENT, parameters.layer // 256),
        # The optimiser copies the gradients of one sub-group to float32 at a time.
        "sub_group_size": bucket,
    }
    if training.offload_parameters:
        settings["offload_param"] = _offload(device)
    return settings


def _bucket(parameters: ParameterSizes) -> int:
    """Elements of a communication buffer: one layer, within limits."""
    size = min(max(parameters.layer, MIN_BUCKET), MAX_BUCKET)
    return -(-size // BUCKET_MULTIPLE) * BUCKET_MULTIPLE
