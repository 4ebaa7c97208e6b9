"""DeepSpeed ZeRO training of the full model. The only file that imports deepspeed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config import ModelConfig, OptimizerConfig, TrainingConfig
from rlhf.models import load_policy


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

    def __init__(
        self,
        model_path: Path,
        model: ModelConfig,
        training: TrainingConfig,
        optimizer: OptimizerConfig,
        device: str,
    ) -> None:
        import deepspeed

        self.zero_stage = training.zero_stage
        self._packing = training.packing
        self.device = torch.device("cpu" if device == "cpu" else f"cuda:{torch.cuda.current_device()}")
        settings = zero_settings(model.dtype, training, optimizer)
        policy = load_policy(
            model_path,
            model.dtype,
            attention=model.attention,
            gradient_checkpointing=training.gradient_checkpointing,
            trust_remote_code=model.trust_remote_code,
        )
        # Keys that share one tensor (tied embeddings) are all sent to engines: some reload them one by one.
        self.state_names = list(policy.state_dict().keys())
        self.engine, *_ = deepspeed.initialize(model=policy, model_parameters=policy.parameters(), config=settings)

    @property
    def module(self) -> Any:
        return self.engine.module

    @property
    def ranks(self) -> int:
        return self.engine.world_size

    def logits(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, T] right-padded tokens, `lengths` [B] -> logits [B, T, V]."""
        return _logits(self.engine, token_ids.to(self.device), lengths.to(self.device), packing=self._packing)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this micro-batch; `last` is True for the last one before `step`.

        `loss` is this rank's part of the global loss: parts add up over ranks and micro-batches.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        # ZeRO averages gradients over ranks, while our parts are to be summed: undo the average here, and only here.
        self.engine.backward(loss * self.ranks, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, apply AdamW with `learning_rate`, clear gradients. Returns the global gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def sum_over_ranks(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item()

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Inside, the named tensors whole (gathered under ZeRO-3, on every rank), as views that must not be changed."""
        import deepspeed

        found = self._tensors()
        wanted = {name: found[name] for name in names}
        shards = [p for p in wanted.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(shards, enabled=bool(shards)):
            yield {name: tensor.detach() for name, tensor in wanted.items()}

    def full_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and whole shape of a parameter, without gathering it."""
        tensor = self._tensors()[name]
        return tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape))

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers under every name they have; tied ones occur more than once."""
        parameters: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        return parameters | dict(self.module.named_buffers(remove_duplicate=False))

    def close(self) -> None:
        self.engine.destroy()


class FrozenModel:
    """Weights that never change, for log-probs only; under ZeRO-3 each rank holds its share of them."""

    def __init__(self, model_path: Path, model: ModelConfig, training: TrainingConfig, device: torch.device) -> None:
        policy = load_policy(
            model_path, model.dtype, attention=model.attention, trust_remote_code=model.trust_remote_code
        )
        self._device = device
        self._packing = training.packing
        self._model = policy.eval().requires_grad_(False)
        if training.zero_stage == 3:
            import deepspeed

            self._model, *_ = deepspeed.initialize(model=policy, config=_frozen_settings(model.dtype, training))
        else:
            self._model.to(device)

    @torch.no_grad()
    def logits(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """[B, T] right-padded tokens, `lengths` [B] -> logits [B, T, V]. Collective under ZeRO-3."""
        return _logits(self._model, token_ids.to(self._device), lengths.to(self._device), packing=self._packing)

    def close(self) -> None:
        if hasattr(self._model, "destroy"):
            self._model.destroy()


def _logits(model: Any, token_ids: Tensor, lengths: Tensor, *, packing: bool) -> Tensor:
    """Logits [B, T, V]; where `packing`, what they hold on padding is zero."""
    position = torch.arange(token_ids.shape[1], device=token_ids.device)
    present = position[None] < lengths[:, None]
    if not packing:
        return model(input_ids=token_ids, attention_mask=present.long(), use_cache=False).logits
    # Positions that start again and no mask are how transformers knows several sequences in one row: it then keeps
    # attention within each of them.
    positions = position.expand_as(token_ids)[present][None]
    packed = model(input_ids=token_ids[present][None], position_ids=positions, use_cache=False).logits[0]
    spread = packed.new_zeros(*token_ids.shape, packed.shape[-1])
    spread[present] = packed
    return spread


def _frozen_settings(dtype: str, training: TrainingConfig) -> dict[str, Any]:
    """ZeRO-3 without an optimiser: parameters are partitioned, and gathered layer by layer in the forward pass."""
    zero: dict[str, Any] = {"stage": 3}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


def zero_settings(dtype: str, training: TrainingConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for this run."""
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    adam = {
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        # torch's own AdamW: DeepSpeed's fused ones are compiled at first use.
        "torch_adam": True,
    }
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        # Micro-batches are counted by the learner, which knows how many rows this step has.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
