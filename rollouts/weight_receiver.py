"""Engine half of the weight sync, loaded inside every vLLM worker (named as its `worker_extension_cls`).

Registers three weight-transfer backends: `groupwise_ray` brings the weights as bytes and needs no GPU;
`groupwise_nccl` and `groupwise_cuda_ipc` are vLLM's own. All of them record a digest of each tensor they receive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf.weight_sync.digests import tensor_digest

Weights = Iterable[tuple[str, torch.Tensor]]


class DigestsReceived:
    """Mixin: while an update is open, every tensor on its way into the model leaves its digest in `digests`."""

    model: torch.nn.Module

    def start_weight_update(self) -> None:
        super().start_weight_update()  # type: ignore[misc]
        self.digests: dict[str, str] = {}
        model: Any = self.model
        model.load_weights = self._recording(model.load_weights)

    def finish_weight_update(self) -> None:
        self._stop_recording()
        super().finish_weight_update()  # type: ignore[misc]

    def shutdown(self) -> None:
        self._stop_recording()
        super().shutdown()  # type: ignore[misc]

    def _recording(self, load_weights: Callable[..., Any]) -> Callable[..., Any]:
        def record(weights: Weights) -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                self.digests[name] = tensor_digest(tensor)
                yield name, tensor

        return lambda weights, *args, **kwargs: load_weights(record(weights), *args, **kwargs)

    def _stop_recording(self) -> None:
        # The recorder sits on the instance and hides the class's method of the same name.
        self.model.__dict__.pop("load_weights", None)


@dataclass
class BytesInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the bytes come with each update."""


@dataclass
class BytesUpdateInfo(WeightTransferUpdateInfo):
    """One layer group as safetensors bytes; `names` keeps its order."""

    names: list[str]
    payload: bytes


class _BytesEngine(WeightTransferEngine[BytesInitInfo, BytesUpdateInfo]):
    init_info_cls = BytesInitInfo
    update_info_cls = BytesUpdateInfo

    def init_transfer_engine(self, init_info: BytesInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        # CPU linear layers are pre-packed: only the layerwise reload puts new weights where they are used.
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BytesUpdateInfo) -> None:
        tensors = safetensors.torch.load(update_info.payload)
        self.model.load_weights((name, tensors[name].to(self.device)) for name in update_info.names)

    def shutdown(self) -> None:
        pass


class RayReceiver(DigestsReceived, _BytesEngine):
    pass


class NcclReceiver(DigestsReceived, NCCLWeightTransferEngine):
    pass


class CudaIpcReceiver(DigestsReceived, IPCWeightTransferEngine):
    pass


class ReceiverExtension:
    """Mixed into vLLM's worker class: lets the engine ask each worker what it received."""

    weight_transfer_engine: Any

    def received_digests(self) -> dict[str, str]:
        return dict(getattr(self.weight_transfer_engine, "digests", {}))


def _register() -> None:
    for name, receiver in (
        ("groupwise_ray", RayReceiver),
        ("groupwise_nccl", NcclReceiver),
        ("groupwise_cuda_ipc", CudaIpcReceiver),
    ):
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, receiver)


def _unlock_bfloat16() -> None:
    """Get the kernel's permission for AMX in this process; without one bf16 matmul by torch, vLLM's own dies."""
    if not torch.cuda.is_available():
        torch.ones(32, 32, dtype=torch.bfloat16) @ torch.ones(32, 32, dtype=torch.bfloat16)


_register()
_unlock_bfloat16()
