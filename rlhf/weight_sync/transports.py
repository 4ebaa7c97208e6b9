"""How tensors travel from the learner to the engines. The only file in `rlhf` that imports vllm, and only on GPU.

Every transport drives vLLM's native handshake (init, start, update, finish) through an `EngineClient` on rank 0; all
learner ranks call `send_weights` because reading the source is a collective.
"""

from __future__ import annotations

import importlib
import socket
from typing import Any, Protocol

import safetensors.torch
import torch

from rlhf.config import RunConfig
from rlhf.errors import ConfigError
from rlhf.weight_sync.source import ZeroWeightSource


class EngineClient(Protocol):
    """vLLM's `VLLMWeightSyncClient`: the control calls, each made on every engine before it returns.

    `version` is what the next `finish_weight_update` announces; vLLM's own transports do not pass one.
    """

    version: int

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Transport(Protocol):
    """`send_weights` returns when every engine has finished loading; called on every learner rank."""

    def send_weights(self) -> None: ...


class RayTransport:
    """Weights as bytes through Ray's object store, one layer group a message. Needs no GPU."""

    def __init__(self, client: EngineClient, source: ZeroWeightSource, rank: int, config: RunConfig) -> None:
        self.client = client
        self.source = source
        self.is_sender = rank == 0
        if self.is_sender:
            client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        if self.is_sender:
            self.client.start_weight_update()
        for group in self.source.iter_groups():
            if self.is_sender:
                self.send_group(group)
        if self.is_sender:
            self.client.finish_weight_update()

    def send_group(self, group: dict[str, torch.Tensor]) -> None:
        on_host = {name: tensor.cpu() for name, tensor in group.items()}
        self.client.update_weights({"names": list(on_host), "payload": safetensors.torch.save(on_host)})


def nccl_transport(client: EngineClient, source: ZeroWeightSource, rank: int, config: RunConfig) -> Transport:
    """vLLM's packed NCCL broadcast: learner rank 0 and every engine worker form one group."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    workers = config.rollouts.num_engines * config.rollouts.tensor_parallel_size
    info = NCCLTrainerInitInfo(
        master_address=socket.gethostbyname(socket.gethostname()),
        master_port=free_port(),
        world_size=1 + workers,
        rank=rank,
    )
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def cuda_ipc_transport(client: EngineClient, source: ZeroWeightSource, rank: int, config: RunConfig) -> Transport:
    """vLLM's CUDA IPC: engines read the learner's memory on the GPU that both share."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return WeightTransferTrainerFactory.trainer_init(
        IPCTrainerInitInfo(rank=rank, packed=True), client=client, source=source
    )


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
