"""DeepSpeed ZeRO training of the full model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config import ModelConfig, OptimizerConfig, TrainingConfig
from rlhf.errors import StorageError
from rlhf.models import load_policy
from rlhf.training.attention import ATTENTION, register
from rlhf.training.model_files import ModelFiles
from rlhf.training.token_model import Pack, TokenModel
from rlhf.training.zero_model import available_optimizer, partitioned_model
from rlhf.training.zero_settings import ParameterSizes, frozen_settings, zero_settings
from rlhf.weight_sync.digests import Digests


def environment(device: str, ranks: int) -> dict[str, str]:
    """Environment variables that must be set before deepspeed is imported."""
    cpu = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(ranks)} if device == "cpu" else {}
    return {"TOKENIZERS_PARALLELISM": "false", **cpu}


def join_process_group(rank: int, ranks: int, address: str, port: int, device: str, deadline_s: float) -> None:
    """Join the collective of all learner ranks. Every collective in it fails after `deadline_s` instead of hanging."""
    local_rank = 0  # a worker sees only the device that the cluster gave it
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    import deepspeed

    if device == "cpu":
        # The shared-memory op is compiled on first use and leaks 69 MB of /dev/shm a rank; gloo gives the same losses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if device == "cpu" else "nccl",
        timeout=timedelta(seconds=deadline_s),
        auto_mpi_discovery=False,
        verbose=False,
    )


class DeepSpeedEngine:
    """One rank's share of the model, its gradients and its optimiser. All methods are collective over the ranks."""

    def __init__(self, model_path: Path, model: ModelConfig, training: TrainingConfig, device: str) -> None:
        import deepspeed

        self.device = _torch_device(device)
        adam, problem = available_optimizer(training, device)
        if problem is not None:
            print(f"optimiser: {adam} instead. {problem}")  # into the log of this worker
        sizes = ParameterSizes.of(_shapes(model_path))
        # Without an optimiser's settings: each stage brings its own.
        settings = zero_settings(model, training, None, device, sizes, adam=adam)
        self.causal_lm = _causal_lm(
            model_path, model, training, settings, gradient_checkpointing=training.gradient_checkpointing
        )
        policy = TokenModel(self.causal_lm)
        # Keys that share one tensor (tied embeddings) are all sent to engines: some reload them one by one.
        self.state_names = list(self.causal_lm.state_dict().keys())
        self._engine, *_ = deepspeed.initialize(model=policy, model_parameters=policy.parameters(), config=settings)
        # Parameters and buffers under every name they have; tied ones occur more than once.
        self._tensors: dict[str, Tensor] = dict(self.causal_lm.named_parameters(remove_duplicate=False))
        self._tensors |= dict(self.causal_lm.named_buffers(remove_duplicate=False))

    def configure_optimizer(self, optimizer: OptimizerConfig, *, fresh: bool) -> None:
        """Take the settings of `optimizer`, and forget all moments if it is to be `fresh`; the weights stay."""
        zero = self._engine.optimizer
        zero.clip_grad = optimizer.max_grad_norm
        if fresh:
            zero.optimizer.state.clear()
        for group in zero.optimizer.param_groups:
            if fresh:
                group.pop("step", None)  # DeepSpeed's fused Adam counts here
            group |= {"betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}

    def forward(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-probs [M] with gradient, entropy [M]) of the pack's trained tokens."""
        return self._engine(pack, temperature)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this micro-batch; `last` is True for the last one before `step`.

        `loss` is this rank's part of the global loss: parts add up over ranks and micro-batches.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # ZeRO averages gradients over ranks, while our parts are to be summed: undo the average here, and only here.
        self._engine.backward(loss * self._engine.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, apply AdamW with `learning_rate`, clear gradients. Returns the global gradient norm before clipping.

        Where that is not finite, on any rank, all ranks return infinity and leave weights and moments as they were.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if self._engine.optimizer.overflow:  # under ZeRO-3 the norm would be that of the step before
            return math.inf
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def sum_over_ranks(self, value: Tensor) -> float:
        """The sum of a scalar on the device over all ranks."""
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total.item()

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Inside, the named tensors whole (gathered under ZeRO-3, on every rank), as views that must not be changed."""
        import deepspeed

        wanted = {name: self._tensors[name] for name in names}
        shards = [p for p in wanted.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(shards, enabled=bool(shards)):
            yield {name: tensor.detach() for name, tensor in wanted.items()}

    def full_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and whole shape of a parameter, without gathering it."""
        tensor = self._tensors[name]
        return tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape))

    def save_state(self, directory: Path) -> None:
        """Write weights, float32 masters and the optimiser's moments into `directory`: each rank its share."""
        self._engine.save_checkpoint(str(directory), tag=_STATE, save_latest=False)

    def load_state(self, directory: Path) -> None:
        """Take up what `save_state` wrote, with as many ranks and the same ZeRO stage."""
        path, _ = self._engine.load_checkpoint(str(directory), tag=_STATE)
        if path is None:
            raise StorageError(f"{directory}: must hold a learner's state, and has none that DeepSpeed can read.")

    def master_digests(self) -> dict[str, str]:
        """Digest of this rank's part of the float32 master of each parameter: the bits the optimiser goes on from."""
        digests = Digests()
        for name, parameter in self.causal_lm.named_parameters():
            part = _master_part(parameter)
            if part is not None:
                digests.add(name, part)
        return digests.read()

    def close(self) -> None:
        self._engine.destroy()


def _master_part(parameter: Tensor) -> Tensor | None:
    """This rank's part of the parameter's float32 master; None where other ranks have it all."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(parameter)
    mapping = getattr(parameter, "_hp_mapping", None)
    return None if mapping is None else mapping.get_hp_fragment()


_STATE = "learner"
"""The directory that DeepSpeed makes for what it saves."""


class FrozenModel:
    """Weights that never change, for log-probs only.

    Each rank holds its share of them under ZeRO-3, and in host memory with `training.offload_reference`.
    """

    def __init__(self, model_path: Path, model: ModelConfig, training: TrainingConfig, device: str) -> None:
        self.device = _torch_device(device)
        if training.offload_reference:
            training = training.model_copy(update={"zero_stage": 3, "offload_parameters": True})
        settings = frozen_settings(model, training, device, ParameterSizes.of(_shapes(model_path)))
        causal_lm = _causal_lm(model_path, model, training, settings, gradient_checkpointing=False)
        self._model: Any = TokenModel(causal_lm).eval().requires_grad_(False)
        if training.zero_stage == 3:
            import deepspeed

            self._model, *_ = deepspeed.initialize(model=self._model, config=settings)
        else:
            self._model.to(self.device)

    @torch.no_grad()
    def forward(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-probs [M], entropy [M]) of the pack's trained tokens. Collective under ZeRO-3."""
        return self._model(pack, temperature)

    def close(self) -> None:
        if hasattr(self._model, "destroy"):
            self._model.destroy()


def _causal_lm(
    path: Path,
    model: ModelConfig,
    training: TrainingConfig,
    settings: dict[str, Any],
    *,
    gradient_checkpointing: bool,
) -> Any:
    """The model with attention over packs: partitioned from the start under ZeRO-3, else whole."""
    register()
    if training.zero_stage == 3:
        return partitioned_model(
            path, model, settings, gradient_checkpointing=gradient_checkpointing, attention=ATTENTION
        )
    return load_policy(
        path,
        model.dtype,
        attention=ATTENTION,
        gradient_checkpointing=gradient_checkpointing,
        trust_remote_code=model.trust_remote_code,
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    files = ModelFiles(path)
    return {name: files.shape(name) for name in files.names}


def _torch_device(device: str) -> torch.device:
    return torch.device("cpu" if device == "cpu" else f"cuda:{torch.cuda.current_device()}")
