from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.weight_sync.transports import RayTransport, free_port, open_transport, receiver_of

GROUPS = [
    {"model.embed": torch.arange(6.0).view(2, 3)},
    {"model.layers.0.b": torch.ones(2, dtype=torch.bfloat16), "model.layers.0.a": torch.zeros(())},
]


class Client:
    def __init__(self) -> None:
        self.version = 0
        self.calls: list[tuple[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.calls.append(("start", None))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(("finish", weight_version))


class Source:
    def __init__(self) -> None:
        self.read = 0

    def iter_groups(self) -> Iterator[dict[str, Tensor]]:
        for group in GROUPS:
            self.read += 1
            yield group


def config(transport: str) -> Any:
    return types.SimpleNamespace(transport=transport)


def opened(rank: int) -> tuple[RayTransport, Client, Source]:
    client, source = Client(), Source()
    return RayTransport(client, source, rank, config("ray")), client, source  # type: ignore[arg-type]


def test_the_sender_drives_init_start_update_and_finish_in_order() -> None:
    transport, client, _ = opened(rank=0)
    assert [name for name, _ in client.calls] == ["init"]
    transport.send_weights()
    transport.send_weights()
    assert [name for name, _ in client.calls] == ["init", *["start", "update", "update", "finish"] * 2]


def test_a_message_is_one_layer_group_with_every_bit_and_its_order() -> None:
    transport, client, _ = opened(rank=0)
    transport.send_weights()
    updates = [info for name, info in client.calls if name == "update"]
    assert [info["names"] for info in updates] == [list(group) for group in GROUPS]
    for info, group in zip(updates, GROUPS, strict=True):
        received = safetensors.torch.load(info["payload"])
        assert received.keys() == group.keys()
        for name, tensor in group.items():
            assert received[name].dtype == tensor.dtype
            assert torch.equal(received[name], tensor)


def test_other_ranks_read_the_source_because_that_is_collective_and_say_nothing() -> None:
    transport, client, source = opened(rank=1)
    transport.send_weights()
    assert source.read == 2
    assert client.calls == []


def test_a_failed_update_does_not_announce_a_version() -> None:
    transport, client, _ = opened(rank=0)

    def lost(info: dict[str, Any]) -> None:
        raise ConnectionError("engine gone")

    client.update_weights = lost  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        transport.send_weights()
    assert [name for name, _ in client.calls] == ["init", "start"]


def test_the_configured_transport_is_opened() -> None:
    client: Any = Client()
    assert isinstance(open_transport(client, Source(), 0, config("ray")), RayTransport)  # type: ignore[arg-type]


def test_a_transport_of_ones_own_is_imported_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("my_transports")
    module.Mine = lambda client, source, rank, config: ("mine", rank)
    monkeypatch.setitem(sys.modules, "my_transports", module)
    found: Any = open_transport(Client(), Source(), 3, config("my_transports:Mine"))  # type: ignore[arg-type]
    assert found == ("mine", 3)


@pytest.mark.parametrize("path", ["no_such_module_here:Mine", "math:NoSuchClass"])
def test_one_that_cannot_be_imported_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"weight_sync.transport = {path}: must be importable as package.module:"):
        open_transport(Client(), Source(), 0, config(path))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("transport", "receiver"), [("ray", "ray"), ("nccl", "nccl"), ("cuda_ipc", "cuda_ipc"), ("mine:Mine", "ray")]
)
def test_which_receiver_the_engines_load(transport: str, receiver: str) -> None:
    assert receiver_of(transport) == receiver


def test_a_free_port_is_one() -> None:
    assert 1024 <= free_port() < 65536
