"""How tensors travel from the learner to the engines. The only file in `rlhf` that imports vllm, and only on GPU.

Every transport drives vLLM's native handshake (init, start, update, finish) through an `EngineClient` on rank 0; all
learner ranks take part because reading the source is a collective.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rlhf.config import RunConfig
from rlhf.errors import ConfigError
from rlhf.weight_sync.digests import Digests, tensor_bytes
from rlhf.weight_sync.source import ZeroWeightSource


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor on the wire: its bytes uint8 [n] in host memory, in the order of its elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


class EngineClient(Protocol):
    """vLLM's `VLLMWeightSyncClient`, and the staging of weights ahead of it: each call is made on every engine.

    `version` is what the next `finish_weight_update` announces; vLLM's own transports do not pass one. `address` is
    that of this machine as the engines reach it.
    """

    version: int
    address: str

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def stage_weights(self, number: int, tensors: Sequence[PackedTensor]) -> None:
        """Begin to bring layer group `number` of the next version to the engines, which keep it until it is loaded."""
        ...

    def wait_until_staged(self) -> None: ...

    def load_staged_weights(self) -> None:
        """Start, update from what was staged and finish, in one call to each engine."""
        ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Transport(Protocol):
    """The two halves of a weight sync, each called on every learner rank."""

    def prepare(self) -> None:
        """Do whatever can be done while engines generate."""
        ...

    def send_weights(self) -> None:
        """Return when every engine has finished loading; engines are paused."""
        ...

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest by name of every tensor that was sent last."""
        ...


class RayTransport:
    """Weights as bytes through Ray's object store. Needs no GPU.

    They are read, hashed and brought to the engines while these generate: a pause is as long as the loading.
    """

    def __init__(self, client: EngineClient, source: ZeroWeightSource, rank: int, config: RunConfig) -> None:
        self.client = client
        self.source = source
        self.is_sender = rank == 0
        self._digests = Digests()
        if self.is_sender:
            client.init_weight_transfer_engine({})

    @property
    def digests(self) -> dict[str, str]:
        return self._digests.read()

    def prepare(self) -> None:
        self._digests = Digests()
        for number, group in enumerate(self.source.iter_groups()):
            if self.is_sender:
                on_host = {name: tensor.detach().cpu() for name, tensor in group.items()}
                for name, tensor in on_host.items():
                    self._digests.add(name, tensor)
                self.client.stage_weights(number, self.packed(on_host))
        if self.is_sender:
            self.client.wait_until_staged()

    def packed(self, tensors: Mapping[str, Tensor]) -> list[PackedTensor]:
        """A layer group as it goes on the wire."""
        return [
            PackedTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor_bytes(tensor))
            for name, tensor in tensors.items()
        ]

    def send_weights(self) -> None:
        if self.is_sender:
            self.client.load_staged_weights()


class StreamedTransport:
    """One of vLLM's own transports: device to device, so there is nothing to prepare."""

    def __init__(self, trainer: Any, source: ZeroWeightSource) -> None:
        self._trainer = trainer
        self._source = source

    @property
    def digests(self) -> dict[str, str]:
        return self._source.digests

    def prepare(self) -> None:
        pass

    def send_weights(self) -> None:
        self._trainer.send_weights()


def nccl_transport(client: EngineClient, source: ZeroWeightSource, rank: int, config: RunConfig) -> Transport:
    """vLLM's packed NCCL broadcast: learner rank 0 and every engine worker form one group."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    workers = config.rollouts.num_engines * config.rollouts.tensor_parallel_size
    info = NCCLTrainerInitInfo(
        master_address=client.address,
        master_port=free_port(),
        world_size=1 + workers,
        rank=rank,
    )
    return StreamedTransport(WeightTransferTrainerFactory.trainer_init(info, client=client, source=source), source)


def cuda_ipc_transport(client: EngineClient, source: ZeroWeightSource, rank: int, config: RunConfig) -> Transport:
    """vLLM's CUDA IPC: engines read the learner's memory on the GPU that both share."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

    # One buffer is used again and again, and vLLM refuses a tensor that does not fit it.
    largest = max(meta.size_bytes for meta in source.metadata())
    buffer = max(largest, DEFAULT_PACKED_BUFFER_SIZE_BYTES)
    info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer)
    return StreamedTransport(WeightTransferTrainerFactory.trainer_init(info, client=client, source=source), source)


TRANSPORTS = {"ray": RayTransport, "nccl": nccl_transport, "cuda_ipc": cuda_ipc_transport}


def open_transport(client: EngineClient, source: ZeroWeightSource, rank: int, config: RunConfig) -> Transport:
    """The transport that the configuration names: one of ours, or `package.module:Class` with the same arguments."""
    name = config.transport
    factory = TRANSPORTS[name] if name in TRANSPORTS else _imported(name)
    return factory(client, source, rank, config)


def receiver_of(transport: str) -> str:
    """Which receiving backend the engines load for a transport; one of your own talks to the one for bytes."""
    return transport if transport in TRANSPORTS else "ray"


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            [f"weight_sync.transport = {path}: must be importable as package.module:Class. {error}. Check PYTHONPATH."]
        ) from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
