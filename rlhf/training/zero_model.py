"""Load a model that is partitioned from the start (ZeRO-3): no rank holds more than one whole tensor at a time.

The model is built with empty parameters, each of which is partitioned as soon as it is made. Then each rank copies its
own part of every tensor out of the memory-mapped files. No weight is initialised, sent or gathered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import no_init_weights

from rlhf.config import ModelConfig, TrainingConfig
from rlhf.errors import ConfigError
from rlhf.models import attention_error, in_training_mode, policy_config, torch_dtype
from rlhf.training.model_files import ModelFiles, few
from rlhf.training.zero_settings import OptimizerName, optimizer_name


def partitioned_model(
    path: str | Path, model: ModelConfig, settings: dict[str, Any], *, gradient_checkpointing: bool, attention: str
) -> PreTrainedModel:
    """Return the causal language model at `path`, of which this rank holds its part; the counterpart of `load_policy`.

    Collective over the ranks of the process group, which must exist. `settings` are those that deepspeed.initialize
    gets. Raises ConfigError where the files do not fit the model.
    """
    files = ModelFiles(path)
    policy = _empty_model(path, model, settings, attention)
    problems = _fill(policy, files)
    if problems:
        raise ConfigError([f"model.path = {path}: {problem}" for problem in problems])
    return in_training_mode(policy, gradient_checkpointing=gradient_checkpointing)


def _empty_model(path: str | Path, model: ModelConfig, settings: dict[str, Any], attention: str) -> PreTrainedModel:
    """The model with partitioned parameters that hold nothing yet, and buffers that hold their final values."""
    config = policy_config(path, trust_remote_code=model.trust_remote_code)
    try:
        with no_init_weights(), _partitioning(settings):
            policy = AutoModelForCausalLM.from_config(
                config,
                dtype=torch_dtype(model.dtype),
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )
    except ImportError as error:
        raise attention_error(attention, error) from error
    policy.tie_weights()  # part of the initialisation that was left out
    if (Path(path) / "generation_config.json").is_file():
        policy.generation_config = GenerationConfig.from_pretrained(path)
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(_device())
    return policy


def _partitioning(settings: dict[str, Any]) -> Any:
    """DeepSpeed's context for building partitioned models, without what would change or send the values."""
    import deepspeed

    class EmptyInit(deepspeed.zero.Init):
        def _zero_init_param(self, param: Tensor) -> None:
            # The original sends rank 0's values of the whole parameter to all ranks first. There are none.
            self._convert_to_deepspeed_param(param)
            param.partition()

    # With its overrides DeepSpeed casts every new tensor, and rotary frequencies would lose half of their digits.
    return EmptyInit(config_dict_or_path=settings, tensor_overrides=frozenset())


def _device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fill(policy: PreTrainedModel, files: ModelFiles) -> list[str]:
    """Copy this rank's part of every tensor. Returns what does not fit; it is the same on every rank."""
    state = policy.state_dict(keep_vars=True)
    problems: list[str] = []
    unexpected: list[str] = []
    filled: dict[int, tuple[str, Tensor | None]] = {}
    shared = _shared_tensors(state)
    for name, source in _checkpoint(policy, files):
        if name not in state:
            unexpected.append(name)
            continue
        target = state[name]
        if tuple(source.shape) != _whole_shape(target):
            problems.append(_shape_problem(name, source, target))
        elif id(target) not in filled:
            _copy_part(source, target)
        else:
            problems += _tie_problems(name, source, *filled[id(target)])
        filled[id(target)] = (name, source if id(target) in shared else None)
    missing = [name for name, tensor in state.items() if id(tensor) not in filled and not _may_miss(policy, name)]
    return problems + _name_problems(policy, missing, _not_ignored(policy, unexpected))


def _copy_part(source: Tensor, target: Tensor) -> None:
    """Copy the whole of `source` into a tensor that is whole, and this rank's part into one that is partitioned."""
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


def _shared_tensors(state: Mapping[str, Tensor]) -> set[int]:
    """Identities of the tensors that have several names."""
    seen: set[int] = set()
    return {id(tensor) for tensor in state.values() if id(tensor) in seen or seen.add(id(tensor))}


# --- names ------------------------------------------------------------------------------------------------------------


def _checkpoint(policy: PreTrainedModel, files: ModelFiles) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the files under the names of the model.

    For most models the two are the same, and tensors are views of the files. Some checkpoints name or cut weights
    otherwise (one tensor for each expert); those go through the conversions that transformers has for them, one tensor
    of the model at a time.
    """
    transforms = get_model_conversion_mapping(policy)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = policy.state_dict(keep_vars=True)
    collected: dict[str, WeightConverter] = {}
    for stored in sorted(files.names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, policy.base_model_prefix, state)
        if stored in state or pattern is None:
            yield (stored if stored in state else name), files.read(stored)
        else:
            converter = collected.setdefault(name, deepcopy(of_pattern[pattern]))
            converter.add_tensor(name, stored, pattern, partial(files.read, stored))
    for name, converter in collected.items():
        yield from _converted(policy, name, converter)


def _converted(policy: PreTrainedModel, name: str, converter: WeightConverter) -> Iterator[tuple[str, Tensor]]:
    for target, tensor in converter.convert(name, model=policy, config=policy.config).items():
        yield target, tensor[0] if isinstance(tensor, list) else tensor


def _may_miss(policy: PreTrainedModel, name: str) -> bool:
    """A buffer keeps the value that it was built with, where the model allows that. A parameter has none."""
    patterns = policy._keys_to_ignore_on_load_missing or ()
    is_buffer = name not in dict(policy.named_parameters(remove_duplicate=False))
    return is_buffer and any(re.search(pattern, name) for pattern in patterns)


def _not_ignored(policy: PreTrainedModel, names: list[str]) -> list[str]:
    """Names that neither the model nor transformers knows to leave out, such as buffers that are computed today."""
    patterns = [*(policy._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _name_problems(policy: PreTrainedModel, missing: list[str], unexpected: list[str]) -> list[str]:
    kind = type(policy).__name__
    fix = "Use files and a config.json that belong together."
    problems = []
    if missing:
        problems.append(f"must hold every tensor of {kind}. Missing: {few(missing)}. {fix}")
    if unexpected:
        problems.append(f"must hold no tensor that {kind} does not have. Unexpected: {few(unexpected)}. {fix}")
    return problems


def _shape_problem(name: str, source: Tensor, target: Tensor) -> str:
    found = f"{name} is {tuple(source.shape)} in the files and {_whole_shape(target)} in the model"
    return f"must have the shapes of its config.json. {found}. Use files and a config.json that belong together."


def _tie_problems(name: str, source: Tensor, other: str, tied: Tensor | None) -> list[str]:
    """Checkpoints may hold a tied tensor twice, with the same values."""
    if tied is None or torch.equal(source, tied):
        return []
    reason = f"{name} and {other} are one tensor in the model and differ in the files"
    fix = "Set tie_word_embeddings to false in config.json, or remove one of the two."
    return [f"must hold tied tensors with equal values. {reason}. {fix}"]


# --- optimisers -------------------------------------------------------------------------------------------------------


def available_optimizer(training: TrainingConfig, device: str) -> tuple[OptimizerName, str | None]:
    """Return the optimiser to use, and why it is not the preferred one, if so.

    DeepSpeed compiles its own at first use, which takes up to a minute and is cached for the next run.
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

    builder = CPUAdamBuilder if adam is OptimizerName.DEEPSPEED_CPU else FusedAdamBuilder
    try:
        builder().load(verbose=False)
    except Exception as error:  # noqa: BLE001 - compilers and loaders fail in many ways
        return f"{adam} cannot be compiled here: {_root_cause(error)}"
    return None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
