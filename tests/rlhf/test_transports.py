from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.weight_sync.digests import Digests
from rlhf.weight_sync.transports import PackedTensor, RayTransport, free_port, open_transport, receiver_of

GROUPS = [
    {"model.embed": torch.arange(6.0).view(2, 3)},
    {"model.layers.0.b": torch.ones(2, dtype=torch.bfloat16), "model.layers.0.a": torch.zeros(())},
]


class Client:
    version = 3
    address = "10.0.0.1"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))

    def stage_weights(self, number: int, tensors: Sequence[PackedTensor]) -> None:
        self.calls.append(("stage", number, tensors))

    def wait_until_staged(self) -> None:
        self.calls.append(("staged",))

    def load_staged_weights(self) -> None:
        self.calls.append(("load",))


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


def test_everything_but_the_loading_is_prepared() -> None:
    transport, client, _ = opened(rank=0)
    assert [name for name, *_ in client.calls] == ["init"]
    for _ in range(2):
        client.calls.clear()
        transport.prepare()
        assert [name for name, *_ in client.calls] == ["stage", "stage", "staged"]
        client.calls.clear()
        transport.send_weights()
        assert client.calls == [("load",)]


def test_a_message_is_one_layer_group_with_every_bit_and_its_order() -> None:
    transport, client, _ = opened(rank=0)
    transport.prepare()
    staged = [call for call in client.calls if call[0] == "stage"]
    assert [number for _, number, _ in staged] == [0, 1]
    for (_, _, tensors), group in zip(staged, GROUPS, strict=True):
        assert [one.name for one in tensors] == list(group)
        for one, tensor in zip(tensors, group.values(), strict=True):
            received = torch.from_numpy(one.data).view(getattr(torch, one.dtype)).view(one.shape)
            assert torch.equal(received, tensor)


def test_the_digests_are_those_of_what_was_prepared_last() -> None:
    transport, _, _ = opened(rank=0)
    assert transport.digests == {}
    expected = Digests()
    for name, tensor in (item for group in GROUPS for item in group.items()):
        expected.add(name, tensor)
    for _ in range(2):
        transport.prepare()
        assert transport.digests == expected.read()


def test_other_ranks_read_the_source_because_that_is_collective_and_say_nothing() -> None:
    transport, client, source = opened(rank=1)
    transport.prepare()
    transport.send_weights()
    assert source.read == 2
    assert client.calls == []


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
