"""One server of the config on this machine, at a port of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rewards.servers.command import command, environment
from rewards.servers.supervisor import Served, Supervisor, held_port
from rlhf.config import ServerConfig


@dataclass(frozen=True, slots=True)
class Terms:
    """What the servers of a run have in common. Whoever has `key` is answered; it must get into no log."""

    device: str
    start_deadline_s: float
    key: str = field(repr=False)
    seed: int = 0


class ModelServer:
    """Starting up; `url` is where it is asked, also while it starts."""

    def __init__(self, name: str, server: ServerConfig, terms: Terms, host: str, log: Path) -> None:
        self._holder, port = held_port(host)
        base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.url = f"{base}/v1"
        self.supervisor = Supervisor(
            Served(
                name=name,
                command=command(server, terms.device, host, port, terms.seed),
                environment=environment(server, terms.device, terms.key),
                health_url=f"{base}/health",
                log=log,
                start_deadline_s=terms.start_deadline_s,
                max_restarts=server.max_restarts,
            )
        )

    def close(self) -> None:
        """It has ended."""
        self.supervisor.close()
        self._holder.close()
