"""Servers of a config on this machine, without Ray: for a reward of a run that has ended, and for tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rewards.servers.command import located
from rewards.servers.server import ModelServer, Terms
from rlhf.config import RewardsConfig, ServerConfig
from rlhf.servers import with_addresses


@dataclass(frozen=True, slots=True)
class LocalServers:
    """Servers that are healthy. They answer whoever has `key`."""

    servers: Mapping[str, ServerConfig]
    urls: Mapping[str, str]
    key: str

    def addressed(self, rewards: RewardsConfig) -> RewardsConfig:
        return with_addresses(rewards, self.servers, self.urls)


@contextmanager
def running(
    servers: Mapping[str, ServerConfig], device: str, log_dir: Path, start_deadline_s: float
) -> Iterator[LocalServers]:
    """All of `servers`, healthy; they end with the context. Raises as `Supervisor.wait_until_healthy`."""
    terms = Terms(device, start_deadline_s, secrets.token_urlsafe(32))
    here = {name: located(server) for name, server in servers.items()}
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(
                closing(ModelServer(name, server, terms, "127.0.0.1", log_dir / f"server-{name}.log"))
            )
            for name, server in here.items()
        }
        for one in started.values():
            one.supervisor.wait_until_healthy()
        yield LocalServers(here, {name: one.url for name, one in started.items()}, terms.key)
