"""The arguments of vLLM, Ray and the transports for GPU clusters, built with their own classes on any machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import cluster, models
from rlhf.cluster import bundles, roles
from rlhf.config import RunConfig
from rlhf.errors import ConfigError, GroupwiseError
from rlhf.models import on_this_machine, prepare_model
from rlhf.vllm_environment import vllm_environment
from rlhf.weight_sync.source import ParameterMeta
from rlhf.weight_sync.transports import nccl_transport
from rollouts.vllm_engine import check_settings, complete_settings, engine_settings

SOURCE = {"kind": "procedural"}
BASE: dict[str, Any] = {
    "experiment": "test",
    "model": {"kind": "exaone4_tiny", "max_context_tokens": 128},
    "data": {"train": SOURCE, "evaluation": SOURCE},
    "stages": {"rl": {"kind": "rl", "steps": 1, "optimizer": {"learning_rate": 1e-4}}},
    "algorithm": {"name": "grpo_icepop"},
    "rewards": {"components": {"math": {}}},
}


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({**BASE, **sections})


def on_gpus(placement: str, tensor_parallel: int = 1, engines: int = 1, ranks: int = 1) -> RunConfig:
    return config(
        cluster={"device": "cuda", "placement": placement},
        rollouts={"tensor_parallel_size": tensor_parallel, "num_engines": engines},
        training={"ranks": ranks},
    )


@pytest.mark.parametrize("tensor_parallel", [1, 2, 8])
def test_an_engine_of_several_gpus_never_asks_for_vllms_ray_executor(tensor_parallel: int) -> None:
    from vllm import AsyncEngineArgs
    from vllm.config import ParallelConfig

    settings = engine_settings(on_gpus("split", tensor_parallel))
    arguments = AsyncEngineArgs(**complete_settings("model", settings, "nccl", 0))
    assert arguments.distributed_executor_backend == ("uni" if tensor_parallel == 1 else "mp")
    assert arguments.tensor_parallel_size == tensor_parallel
    if tensor_parallel == 1:
        parallel = ParallelConfig(tensor_parallel_size=1, distributed_executor_backend="uni")
        assert parallel.world_size == 1


@pytest.mark.parametrize(("placement", "share", "sleeps"), [("split", 0.9, False), ("colocated", 0.6, True)])
def test_an_engine_takes_the_share_of_its_gpu_that_its_placement_leaves(
    placement: str, share: float, sleeps: bool
) -> None:
    settings = engine_settings(on_gpus(placement))
    assert (settings["gpu_memory_utilization"], settings["enable_sleep_mode"]) == (share, sleeps)
    given = config(
        cluster={"device": "cuda", "placement": placement},
        rollouts={"engine_args": {"gpu_memory_utilization": 0.3, "quantization": "fp8"}},
    )
    assert engine_settings(given)["gpu_memory_utilization"] == 0.3
    assert engine_settings(given)["quantization"] == "fp8"


def test_handles_of_gpu_memory_may_pass_between_vllms_processes_only_where_they_do() -> None:
    name = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    assert vllm_environment("cuda", 1, shares_memory=True)[name] == "1"
    assert name not in vllm_environment("cuda", 1)
    assert name not in vllm_environment("cpu", 1)


class Source:
    """The embedding of a large vocabulary in bfloat16: 1.5 GiB in one tensor."""

    def metadata(self) -> list[ParameterMeta]:
        return [ParameterMeta("embed", torch.bfloat16, (153_600, 5120)), ParameterMeta("norm", torch.bfloat16, (5120,))]


def opened(monkeypatch: pytest.MonkeyPatch, placement: str, **sizes: int) -> Any:
    """The init info that a transport gives to vLLM's own trainer side."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    from rlhf.weight_sync import transports

    given: list[Any] = []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda info, **_: given.append(info))
    client: Any = type("Client", (), {"address": "10.1.2.3"})()
    make = nccl_transport if placement == "split" else transports.cuda_ipc_transport
    make(client, Source(), 0, on_gpus(placement, **sizes))  # type: ignore[arg-type]
    return given[0]


def test_the_ipc_buffer_holds_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    info = opened(monkeypatch, "colocated")
    assert info.packed
    assert info.packed_buffer_size_bytes == 153_600 * 5120 * 2


@pytest.mark.parametrize(("tensor_parallel", "engines"), [(1, 1), (2, 3), (8, 4)])
def test_the_nccl_group_has_every_engine_worker_and_an_address_that_others_reach(
    monkeypatch: pytest.MonkeyPatch, tensor_parallel: int, engines: int
) -> None:
    info = opened(monkeypatch, "split", tensor_parallel=tensor_parallel, engines=engines)
    assert info.world_size == 1 + tensor_parallel * engines
    assert info.master_address == "10.1.2.3"


@pytest.mark.parametrize(
    ("placement", "tensor_parallel", "engines", "ranks", "wanted"),
    [
        ("split", 1, 2, 2, [1.0, 1.0, 1.0, 1.0]),
        ("split", 8, 2, 4, [1.0] * 4 + [8.0] * 2),
        ("colocated", 1, 8, 8, [1.0] * 8),
    ],
)
def test_one_bundle_holds_all_gpus_of_an_engine(
    placement: str, tensor_parallel: int, engines: int, ranks: int, wanted: list[float]
) -> None:
    chosen = on_gpus(placement, tensor_parallel, engines, ranks)
    assert [bundle["GPU"] for bundle in bundles(chosen) if "GPU" in bundle] == wanted
    mine = [role for role in roles(chosen) if role.name.startswith("engine")]
    assert {role.gpus for role in mine} == {0.5 if placement == "colocated" else float(tensor_parallel)}


def test_a_hub_model_is_downloaded_on_every_machine_that_lacks_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "_download", lambda chosen: tmp_path / chosen.path)
    hub = config(model={"kind": "hf", "path": "owner/name", "max_context_tokens": 128}).model
    assert on_this_machine(hub, tmp_path) == tmp_path
    assert on_this_machine(hub, Path("/elsewhere/snapshot")) == tmp_path / "owner/name"
    local = config(model={"kind": "hf", "path": "/shared/model", "max_context_tokens": 128}).model
    assert on_this_machine(local, Path("/shared/model")) == Path("/shared/model")


def test_more_gpus_than_this_machine_has_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    cluster._require_this_machine([{"CPU": 1.0, "GPU": 1.0}] * 4)
    with pytest.raises(GroupwiseError, match=r"placement: the run needs 10 GPUs and this machine has 4\. Lower train"):
        cluster._require_this_machine(bundles(on_gpus("split", 8, 1, 2)))


# --- what vLLM itself accepts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_model(config().model, 0, tmp_path_factory.mktemp("model") / "model")


def test_arguments_that_vllm_knows_are_accepted_before_anything_starts(model: Path) -> None:
    before = dict(os.environ)  # an engine of another test may have set vLLM's variables in this process
    check_settings(config(rollouts={"engine_args": {"block_size": 32, "enable_prefix_caching": False}}), model)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"blok_size": 32}, "blok_size"),
        ({"max_num_batched_tokens": 16}, "max_num_batched_tokens"),
    ],
)
def test_arguments_that_vllm_refuses_are_told_with_its_reason(
    model: Path, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(config(rollouts={"engine_args": arguments}), model)
    text = str(caught.value)
    (name,) = arguments
    assert f"rollouts.engine_args = {{{name}={arguments[name]}}}: must be accepted by vLLM." in text
    assert reason in text
