"""A server of the config with real vLLM, for tests that ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.servers.local import running
from rlhf.config import ServerConfig
from rlhf.servers import KEY_VARIABLE

START_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Running:
    url: str
    model: str
    key: str

    @property
    def endpoint(self) -> dict[str, Any]:
        return {"base_url": self.url, "model": self.model, "api_key_env": KEY_VARIABLE, "deadline_s": 120.0}


@contextmanager
def vllm_server(server: ServerConfig, folder: Path) -> Iterator[Running]:
    """The server on CPU, once it is healthy; the caller puts its key into the environment."""
    with running({"test": server}, "cpu", folder, START_DEADLINE_S) as started:
        yield Running(started.urls["test"], server.model, started.key)
