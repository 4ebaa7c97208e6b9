"""Load a model that is partitioned from the start (ZeRO-3): a rank holds one whole tensor at most.

The model is built with empty parameters, each of which is partitioned as soon as it is made. Then
each rank copies its own part of every tensor out of the memory-mapped files. No weight is
initialised, sent or gathered.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from rlhf.config import ModelConfig, TrainingConfig
from rlhf.errors import ConfigError
from rlhf.models import in_training_mode, policy_config, torch_dtype
from rlhf.training.model_files import ModelFiles, few
from rlhf.training.zero_settings import OptimizerName, optimizer_name

Settings = dict[str, Any]
"""DeepSpeed's configuration."""

COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Tensors of older checkpoints that models compute today."""

BUILD_S = 900.0
"""No kernel takes longer to compile, on a busy machine either."""


def partitioned_model(
    path: str | Path,
    model: ModelConfig,
    settings: Settings,
    *,
    gradient_checkpointing: bool,
    attention: str,
) -> PreTrainedModel:
    """Return the causal language model at `path`, of which this rank holds its part.

    The counterpart of `load_policy`. `settings` are those that deepspeed.initialize gets. Sends
    nothing, but the process group must exist. Raises ConfigError where the files do not fit the
    model, on all ranks that see the same files.
    """
    files = ModelFiles(path)
    policy = _empty(Path(path), model, settings, attention)
    problems = _fill(policy, files)
    if problems:
        raise ConfigError([f"model.path = {path}: {problem}" for problem in problems])
    return in_training_mode(policy, gradient_checkpointing=gradient_checkpointing)


def _empty(path: Path, model: ModelConfig, settings: Settings, attention: str) -> PreTrainedModel:
    """Build the model: its partitioned parameters hold nothing yet, its buffers their values."""
    config = policy_config(path, trust_remote_code=model.trust_remote_code)
    with no_init_weights(), _partitioning(settings):
        policy = AutoModelForCausalLM.from_config(
            config,
            dtype=torch_dtype(model.dtype),
            attn_implementation=attention,
            trust_remote_code=model.trust_remote_code,
        )
    policy.tie_weights()  # part of the initialisation that was left out
    if (path / "generation_config.json").is_file():
        policy.generation_config = GenerationConfig.from_pretrained(path)
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(_device())
    return policy


def _partitioning(settings: Settings) -> Any:
    """DeepSpeed's context for building partitioned models, without what changes or sends values."""
    import deepspeed

    class EmptyInit(deepspeed.zero.Init):
        def _zero_init_param(self, param: Any) -> None:
            # The original first sends rank 0's values of the whole parameter to all ranks.
            self._convert_to_deepspeed_param(param)
            param.partition()

    # Its overrides would cast every new tensor: rotary frequencies would lose half of their digits.
    return EmptyInit(config_dict_or_path=settings, tensor_overrides=frozenset())


def _device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


# --- weights --------------------------------------------------------------------------------------


@torch.no_grad()
def _fill(policy: PreTrainedModel, files: ModelFiles) -> list[str]:
    """Copy this rank's part of every tensor. Returns what does not fit, equal on every rank."""
    state = policy.state_dict(keep_vars=True)
    first: dict[int, tuple[str, Tensor | None]] = {}
    problems: list[str] = []
    unexpected: list[str] = []
    tied = _tied(state)
    for name, source in _checkpoint(policy, files):
        target = state.get(name)
        if target is None:
            unexpected.append(name)
        elif tuple(source.shape) != _whole_shape(target):
            problems.append(_shape_problem(name, source, target))
        elif id(target) in first:
            problems += _tie_problems(name, source, *first[id(target)])
        else:
            _copy_part(source, target)
        if target is not None:
            first.setdefault(id(target), (name, source if id(target) in tied else None))
    missing = [name for name, tensor in state.items() if id(tensor) not in first]
    return problems + _name_problems(policy, missing, unexpected)


def _copy_part(source: Tensor, target: Tensor) -> None:
    """Copy `source` into a whole tensor, or this rank's part of it into a partitioned one."""
    if not hasattr(target, "ds_tensor"):
        target.copy_(source)
        return
    part = target.ds_tensor
    start = part.numel() * torch.distributed.get_rank()
    values = source.view(-1)[start : start + part.numel()]
    part[: len(values)].copy_(values)
    part[len(values) :].zero_()  # the last parts are padded to the size of the others


def _whole_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _tied(state: Mapping[str, Tensor]) -> set[int]:
    """Return the identities of the tensors that have several names."""
    count = Counter(map(id, state.values()))
    return {identity for identity, names in count.items() if names > 1}


# --- names ----------------------------------------------------------------------------------------


def _checkpoint(policy: PreTrainedModel, files: ModelFiles) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the files under the names of the model.

    For most models the two are the same, and tensors are views of the files. Some checkpoints name
    or cut weights otherwise (one tensor for each expert); those go through the conversions that
    transformers has for them, one tensor of the model at a time.
    """
    transforms = get_model_conversion_mapping(policy)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = policy.state_dict(keep_vars=True)
    prefix = policy.base_model_prefix
    collected: dict[str, WeightConverter] = {}
    for stored in sorted(files.names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if stored in state:
            yield stored, files.read(stored)
        elif pattern is None:
            yield name, files.read(stored)
        else:
            converter = collected.setdefault(name, deepcopy(of_pattern[pattern]))
            converter.add_tensor(name, stored, pattern, partial(files.read, stored))
    for name, converter in collected.items():
        for target, made in converter.convert(name, model=policy, config=policy.config).items():
            yield target, made[0] if isinstance(made, list) else made


def _name_problems(policy: PreTrainedModel, missing: list[str], unexpected: list[str]) -> list[str]:
    kind = type(policy).__name__
    fix = "Use files and a config.json that belong together."
    problems = []
    if missing := [name for name in missing if not _has_value(policy, name)]:
        problems.append(f"must hold every tensor of {kind}. Missing: {few(missing)}. {fix}")
    if unexpected := [name for name in unexpected if not _is_left_out(policy, name)]:
        problems.append(f"must hold no tensor but those of {kind}. More: {few(unexpected)}. {fix}")
    return problems


def _has_value(policy: PreTrainedModel, name: str) -> bool:
    """A buffer that the files may lack keeps the value it was built with. A parameter has none."""
    patterns = policy._keys_to_ignore_on_load_missing or ()
    is_buffer = name in dict(policy.named_buffers(remove_duplicate=False))
    return is_buffer and any(re.search(pattern, name) for pattern in patterns)


def _is_left_out(policy: PreTrainedModel, name: str) -> bool:
    """The model does without the tensor: it says so, or computes today what older files hold."""
    patterns = policy._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in (*patterns, *COMPUTED))


def _shape_problem(name: str, source: Tensor, target: Tensor) -> str:
    found = f"{name} is {tuple(source.shape)} in the files and {_whole_shape(target)} in the model"
    fix = "Use files and a config.json that belong together."
    return f"must have the shapes of its config.json. {found}. {fix}"


def _tie_problems(name: str, source: Tensor, other: str, tied: Tensor | None) -> list[str]:
    """Checkpoints may hold a tied tensor twice, with the same values."""
    if tied is None or torch.equal(source, tied):
        return []
    reason = f"{name} and {other} are one tensor in the model and differ in the files"
    fix = "Set tie_word_embeddings to false in config.json, or remove one of the two."
    return [f"must hold tied tensors with equal values. {reason}. {fix}"]


# --- optimisers -----------------------------------------------------------------------------------


def available_optimizer(training: TrainingConfig, device: str) -> tuple[OptimizerName, str | None]:
    """Return the optimiser to use, and why it is not the preferred one, if so.

    DeepSpeed compiles its own at first use, which takes a minute or two. The result is kept.
    """
    preferred = optimizer_name(training, device)
    problem = build_problem(preferred)
    return (preferred if problem is None else OptimizerName.TORCH_FUSED), problem


def can_build(adam: OptimizerName) -> bool:
    return build_problem(adam) is None


def build_problem(adam: OptimizerName) -> str | None:
    """Compile and load the optimiser's kernel. Returns the reason where that fails."""
    if adam is OptimizerName.TORCH_FUSED:
        return None
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    builder = (CPUAdamBuilder if adam is OptimizerName.DEEPSPEED_CPU else FusedAdamBuilder)()
    try:
        problem = _lock_problem(builder.name)
        if problem is None:
            builder.load(verbose=False)
    except Exception as error:  # noqa: BLE001 - compilers and loaders fail in many ways
        problem = _root_cause(error)
    return None if problem is None else f"{adam} cannot be compiled here: {problem}"


def _lock_problem(operation: str) -> str | None:
    """Wait for another process that compiles the kernel, but not for one that was killed.

    torch's lock is a file that a killed process leaves behind, and torch waits for it for ever.
    """
    lock = Path(cpp_extension._get_build_directory(operation, False)) / "lock"
    while lock.exists():
        age = time.time() - lock.stat().st_mtime
        if age > BUILD_S:
            fix = "Delete it unless a compiler is running."
            return f"{lock} is {age / 60:.0f} minutes old, left by a process that was killed. {fix}"
        time.sleep(0.5)
    return None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
