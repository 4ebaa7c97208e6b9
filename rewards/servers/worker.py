"""The Ray shell round `ModelServer`, and all servers of a run as one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import ray
import ray.util

from rewards.servers.command import located
from rewards.servers.server import ModelServer, Terms
from rlhf.cluster import Cluster, gather, roles, settled
from rlhf.config import RewardsConfig, RunConfig, ServerConfig
from rlhf.servers import KEY_VARIABLE, with_addresses

ACTOR_DEADLINE_S = 60.0  # for an actor that has nothing to load


class ServerWorker:
    """A `ModelServer` in a Ray actor, on the machine that its placement chose."""

    def __init__(self, name: str, server: ServerConfig, terms: Terms, private: bool, log: Path) -> None:
        """`private`: everybody who asks is on the same machine, so nobody on another one can."""
        host = "127.0.0.1" if private else ray.util.get_node_ip_address()
        self._server = ModelServer(name, server, terms, host, log)

    def url(self) -> str:
        return self._server.url

    def wait_until_healthy(self) -> None:
        self._server.supervisor.wait_until_healthy()

    def metrics(self) -> Mapping[str, float]:
        """Raises the error of a server that is given up."""
        supervisor = self._server.supervisor
        supervisor.check()
        return {"restarts": float(supervisor.restarts), "up": float(supervisor.up)}

    def close(self) -> None:
        self._server.close()


class Servers:
    """The servers of a run, starting up; their addresses are known at once. Nothing happens where there are none."""

    def __init__(self, cluster: Cluster, config: RunConfig, log_dir: Path) -> None:
        self._deadline_s = config.cluster.start_deadline_s
        self._key = secrets.token_urlsafe(32)
        self._servers = {name: located(server) for name, server in config.servers.items()}
        private = config.cluster.address is None
        terms = Terms(config.cluster.device, self._deadline_s, self._key, config.seed)
        actor, places = ray.remote(ServerWorker), {role.name: role for role in roles(config)}
        self._actors = {}
        for name, server in self._servers.items():
            # Several calls at a time: what waits until it is healthy must not keep others from its address.
            options = {"max_concurrency": 4, **cluster.options(places[f"server-{name}"], {})}
            log = log_dir / f"server-{name}.log"
            self._actors[name] = actor.options(**options).remote(name, server, terms, private, log)
        asked = [one.url.remote() for one in self._actors.values()]
        self._urls = dict(zip(self._actors, gather(asked, "addresses of the servers", self._deadline_s), strict=True))

    def addressed(self, rewards: RewardsConfig) -> RewardsConfig:
        """The rewards with the addresses of the servers that they ask."""
        return with_addresses(rewards, self._servers, self._urls)

    @property
    def environment(self) -> dict[str, str]:
        """What the reward workers need to be answered. Not for Ray's options: Ray writes those to its logs."""
        if not self._actors:
            return {}
        hosts = {url.split("//")[1].rpartition(":")[0].strip("[]") for url in self._urls.values()}
        direct = ",".join([*filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy"))]), *sorted(hosts)])
        return {KEY_VARIABLE: self._key, "NO_PROXY": direct, "no_proxy": direct}

    def wait_until_started(self) -> None:
        """Raises the error of the first that does not come up, with the end of its log."""
        waiting = [actor.wait_until_healthy.remote() for actor in self._actors.values()]
        gather(waiting, "start of the servers", self._deadline_s + ACTOR_DEADLINE_S)

    def metrics(self) -> dict[str, float]:
        """`server/<name>/restarts` and `.../up`. Raises the error of a server that is given up."""
        asked = [actor.metrics.remote() for actor in self._actors.values()]
        answers = gather(asked, "metrics of the servers", ACTOR_DEADLINE_S)
        return {
            f"server/{name}/{key}": value
            for name, answer in zip(self._actors, answers, strict=True)
            for key, value in answer.items()
        }

    def shutdown(self) -> None:
        """Every server has ended."""
        settled([actor.close.remote() for actor in self._actors.values()], ACTOR_DEADLINE_S)
