"""Engine half of the weight sync, loaded inside every vLLM worker (named as its `worker_extension_cls`).

Registers three weight-transfer backends: `groupwise_ray` loads weights that were staged as bytes and needs no GPU;
`groupwise_nccl` and `groupwise_cuda_ipc` are vLLM's own. All of them record a digest of each tensor they receive.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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

from rlhf.weight_sync.digests import Digests

Weights = Iterable[tuple[str, torch.Tensor]]
Packed = tuple[str, str, Sequence[int], bytes]
"""Name, dtype, shape and bytes: vLLM's engine process is sent plain types only."""


class DigestsReceived:
    """Mixin: while an update is open, every tensor on its way into the model leaves its digest in `received`."""

    model: torch.nn.Module

    def start_weight_update(self) -> None:
        super().start_weight_update()  # type: ignore[misc]
        self.received = Digests()
        model: Any = self.model
        model.load_weights = self._recording(model.load_weights)

    def finish_weight_update(self) -> None:
        self._stop_recording()
        super().finish_weight_update()  # type: ignore[misc]

    def shutdown(self) -> None:
        self._stop_recording()
        super().shutdown()  # type: ignore[misc]

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Called for each tensor as it goes into the model."""
        self.received.add(name, tensor)

    def _recording(self, load_weights: Callable[..., Any]) -> Callable[..., Any]:
        def record(weights: Weights) -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                self.note(name, tensor)
                yield name, tensor

        return lambda weights, *args, **kwargs: load_weights(record(weights), *args, **kwargs)

    def _stop_recording(self) -> None:
        # The recorder sits on the instance and hides the class's method of the same name.
        self.model.__dict__.pop("load_weights", None)


@dataclass
class StagedInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the tensors come with the staging."""


@dataclass
class StagedUpdateInfo(WeightTransferUpdateInfo):
    """Nothing to say: what is loaded was staged before."""


class _StagedEngine(WeightTransferEngine[StagedInitInfo, StagedUpdateInfo]):
    """Loads tensors that `stage` was given while the engine generated."""

    init_info_cls = StagedInitInfo
    update_info_cls = StagedUpdateInfo

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._forget(version=-1)

    def stage(self, version: int, number: int, tensors: Sequence[Packed]) -> None:
        """Keep layer group `number` of `version`, and its digests. Groups may come in any order."""
        if version != self._version:
            self._forget(version)
        self._groups[number] = [(name, unpacked(data, dtype, shape)) for name, dtype, shape, data in tensors]
        for name, tensor in self._groups[number]:
            self._staged.add(name, tensor)

    def init_transfer_engine(self, init_info: StagedInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        # CPU linear layers are pre-packed: only the layerwise reload puts new weights where they are used.
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._forget(self._version)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: StagedUpdateInfo) -> None:
        # In one call, because vLLM looks all parameters of the model up at each.
        groups = (group for _, group in sorted(self._groups.items()))
        self.model.load_weights((name, tensor.to(self.device)) for group in groups for name, tensor in group)

    def shutdown(self) -> None:
        self._forget(version=-1)

    def _forget(self, version: int) -> None:
        self._version = version
        self._groups: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._staged = Digests()


class RayReceiver(DigestsReceived, _StagedEngine):
    def note(self, name: str, tensor: torch.Tensor) -> None:
        # Hashed when it was staged, and no one has written to it since: bytes are read-only.
        self.received.copy_from(self._staged, name)


def unpacked(data: bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """The tensor over the same memory."""
    if not data:
        return torch.empty(*shape, dtype=getattr(torch, dtype))
    with warnings.catch_warnings():
        # torch warns of every read-only buffer; nothing writes to this one.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=getattr(torch, dtype)).view(*shape)


class NcclReceiver(DigestsReceived, NCCLWeightTransferEngine):
    pass


class CudaIpcReceiver(DigestsReceived, IPCWeightTransferEngine):
    pass


class ReceiverExtension:
    """Mixed into vLLM's worker class: lets the engine ask each worker what it received."""

    weight_transfer_engine: Any

    def received_digests(self) -> dict[str, str]:
        received = getattr(self.weight_transfer_engine, "received", None)
        return {} if received is None else received.read()

    def stage_weights(self, version: int, number: int, tensors: Sequence[Packed]) -> None:
        self.weight_transfer_engine.stage(version, number, tensors)


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
