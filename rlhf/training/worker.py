"""Ray shell of a learner rank, and all ranks as one `LearnerGroup`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from rlhf.batches import Batch, Rows, UpdateReport
from rlhf.cluster import Cluster, gather, redirect_output, roles
from rlhf.config import AlgorithmConfig, OptimizerConfig, RunConfig
from rlhf.metrics import merged
from rlhf.training.batching import deal, micro_batch_count
from rlhf.training.deepspeed_engine import environment
from rlhf.training.rank import LearnerRank
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.transports import free_port
from rlhf.weight_sync.worker import RayEngineClient


class LearnerWorker:
    """One learner rank in its own process."""

    def __init__(self, rank: int, config: RunConfig, log: Path) -> None:
        redirect_output(log)
        torch.set_num_threads(config.cluster.threads_per_process)
        self._rank = LearnerRank(rank, config)

    def rendezvous(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()

    def join(self, address: str, port: int) -> None:
        self._rank.join(address, port)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._rank, method)(*arguments)

    def connect(self, engines: list[ActorHandle], ranks_per_engine: int, deadline_s: float) -> None:
        self._rank.connect(RayEngineClient(engines, ranks_per_engine, deadline_s))


class RayLearnerGroup:
    """All learner ranks: deals rows to them and puts their answers together."""

    def __init__(self, cluster: Cluster, config: RunConfig, log_dir: Path) -> None:
        self._config = config
        self._ranks = config.training.ranks
        variables = environment(config.cluster.device, self._ranks)
        learners = [role for role in roles(config) if role.name.startswith("learner")]
        self._workers = [
            ray.remote(LearnerWorker)
            .options(**cluster.options(role, variables))
            .remote(rank, config, log_dir / f"{role.name}.log")
            for rank, role in enumerate(learners)
        ]

    def join(self) -> None:
        """Form the collective of all ranks."""
        deadline = self._config.cluster.start_deadline_s
        [(address, port)] = gather([self._workers[0].rendezvous.remote()], "start of learner 0", deadline)
        gather([w.join.remote(address, port) for w in self._workers], "start of the learners", deadline)

    def connect(self, engines: list[ActorHandle]) -> None:
        """Open the weight transport to `engines`; a model must be loaded."""
        sync = self._config.weight_sync
        width = self._config.rollouts.tensor_parallel_size
        calls = [w.connect.remote(engines, width, sync.deadline_s) for w in self._workers]
        gather(calls, "weight sync: connect", sync.deadline_s)

    def load(self, model_path: Path, optimizer: OptimizerConfig, total_steps: int, algorithm: AlgorithmConfig) -> None:
        self._all("load", model_path, optimizer, total_steps, algorithm, deadline=self._config.cluster.start_deadline_s)

    def logprobs(self, batch: Rows) -> Tensor:
        return self._gathered("logprobs", batch)

    def reference_logprobs(self, batch: Rows) -> Tensor:
        return self._gathered("reference_logprobs", batch)

    def _gathered(self, method: str, batch: Rows) -> Tensor:
        shares, count = self._deal(batch)
        parts = self._each(method, [(batch.rows(share), count) for share in shares])
        whole = torch.zeros(batch.token_ids.shape)
        for share, part in zip(shares, parts, strict=True):
            whole[share, : part.shape[1]] = part
        return whole

    def update(self, batch: Batch) -> UpdateReport:
        shares, count = self._deal(batch)
        reports = self._each("update", [(batch.rows(share), count) for share in shares])
        return UpdateReport(
            loss=reports[0].loss,
            grad_norm=reports[0].grad_norm,
            learning_rate=reports[0].learning_rate,
            trained_tokens=sum(report.trained_tokens for report in reports),
            metrics=merged(report.metrics for report in reports).result(),
        )

    def save_policy(self, directory: Path) -> None:
        self._all("save_policy", directory)

    def send_weights(self, version: int) -> int:
        return self._all("send_weights", version, deadline=self._config.weight_sync.deadline_s)[0]

    def evidence(self, version: int, probe: Any) -> Evidence:
        return self._all("evidence", version, probe)[0]

    def _deal(self, batch: Rows) -> tuple[list[Tensor], int]:
        count = micro_batch_count(batch, self._ranks, self._config.training.micro_batch_size)
        return deal(batch, self._ranks), count

    def _all(self, method: str, *arguments: Any, deadline: float | None = None) -> list[Any]:
        return self._each(method, [arguments] * self._ranks, deadline)

    def _each(self, method: str, arguments: list[tuple[Any, ...]], deadline: float | None = None) -> list[Any]:
        calls = [worker.call.remote(method, *given) for worker, given in zip(self._workers, arguments, strict=True)]
        return gather(calls, f"learner {method}", deadline or self._config.training.collective_deadline_s)
