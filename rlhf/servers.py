"""Which rewards ask which server of the run, and their parameters with its address filled in.

A reward asks a server by `endpoint: {server: NAME}` anywhere in its params. Before the reward workers start, that
becomes the `base_url`, `model` and `api_key_env` that it would have been given for a server of somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config import RewardsConfig, ServerConfig

KEY_VARIABLE = "GROUPWISE_SERVER_KEY"
"""The environment variable of the reward workers that holds the key of the run's servers."""

GIVEN_BY_SERVER = ("base_url", "model", "api_key_env")
PLACEHOLDER_URL = "http://127.0.0.1:1/v1"  # nobody is asked there

KINDS = {"judge": "chat", "judge_pairwise": "chat", "preference": "reward_model"}
"""Registered reward -> the kind of server that it understands."""


OWN_FLAGS = {
    "model": "model",
    "dtype": "dtype",
    "max-model-len": "max_context_tokens",
    "tensor-parallel-size": "tensor_parallel_size",
    "max-num-seqs": "max_concurrent_requests",
    "gpu-memory-utilization": "gpu_memory_utilization",
    "trust-remote-code": "trust_remote_code",
    "chat-template": "chat_template",
    "runner": "kind",
    "convert": "kind",
}
"""vLLM's flag -> the field of a server that sets it."""

FIXED_FLAGS = ("host", "port", "uds", "api-key", "served-model-name", "middleware", "root-path")
"""Those that decide where a server is and who may ask it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """An endpoint in the params of a component; `key` is where it is in the config."""

    component: str
    key: str
    endpoint: Mapping[str, Any]

    @property
    def server(self) -> str:
        return str(self.endpoint["server"])


def asked(rewards: RewardsConfig) -> Iterator[Asked]:
    """Every endpoint of every component that names a server."""
    for name, part in rewards.components.items():
        for key, endpoint in _endpoints(f"rewards.components.{name}.params", part.params):
            if endpoint.get("server") is not None:
                yield Asked(name, key, endpoint)


def with_addresses(
    rewards: RewardsConfig, servers: Mapping[str, ServerConfig], urls: Mapping[str, str]
) -> RewardsConfig:
    """The same rewards with the address of each server that they ask, from `urls` by its name."""

    def filled(value: Any, key: str = "") -> Any:
        if not isinstance(value, Mapping):
            return value
        inner = {name: filled(item, name) for name, item in value.items()}
        if key != "endpoint" or "server" not in inner:
            return inner
        name = inner.pop("server")
        if name is None:
            return inner
        return {**inner, "base_url": urls[name], "model": servers[name].model, "api_key_env": KEY_VARIABLE}

    components = {
        name: part.model_copy(update={"params": filled(part.params)}) for name, part in rewards.components.items()
    }
    return rewards.model_copy(update={"components": components})


def with_placeholders(rewards: RewardsConfig, servers: Mapping[str, ServerConfig]) -> RewardsConfig:
    """As `with_addresses`, of servers that do not run yet."""
    return with_addresses(rewards, servers, dict.fromkeys(servers, PLACEHOLDER_URL))


def _endpoints(key: str, params: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in params.items() if isinstance(params, Mapping) else ():
        if isinstance(value, Mapping):
            if name == "endpoint":
                yield f"{key}.{name}", value
            yield from _endpoints(f"{key}.{name}", value)
