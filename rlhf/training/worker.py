"""Ray shell of a learner rank, and all ranks as one `RayLearnerGroup`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from rlhf.batches.packing import BatchPlan, Share, WorkModel, plan_batch
from rlhf.batches.ragged import OptimiserStep, RolloutBatch, Sequences, StoredSequences
from rlhf.cluster import Cluster, gather, redirect_output, roles
from rlhf.config import RunConfig
from rlhf.metrics import merged
from rlhf.models import on_this_machine, policy_config
from rlhf.protocols import StageSetup, UpdateReport
from rlhf.training.deepspeed_engine import environment
from rlhf.training.learner import RankReport
from rlhf.training.machine import machine
from rlhf.training.memory import explained_memory
from rlhf.training.rank import LoadedRank, RankSender, StageRank, join
from rlhf.training.zero_settings import memory_environment
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.transports import free_port
from rlhf.weight_sync.worker import RayEngineClient


class LearnerWorker:
    """One learner rank in its own process; calls come in the order join, load_model, then connect and begin_stage."""

    _loaded: LoadedRank
    _sender: RankSender
    _stages: tuple[StageRank, ...] = ()

    def __init__(self, rank: int, config: RunConfig, threads: int, log: Path) -> None:
        redirect_output(log)
        torch.set_num_threads(threads)
        self._number = rank
        self._config = config

    def rendezvous(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()

    def join(self, address: str, port: int) -> None:
        join(self._number, self._config, address, port)

    def load_model(self, model_path: Path) -> None:
        with explained_memory(self._config, "load_model"):
            self._loaded = LoadedRank(self._number, self._config, on_this_machine(self._config.model, model_path))

    def connect(self, engines: list[ActorHandle], ranks_per_engine: int, deadline_s: float) -> None:
        self._sender = self._loaded.connect(RayEngineClient(engines, ranks_per_engine, deadline_s))

    def begin_stage(self, setup: StageSetup) -> None:
        for stage in self._stages:
            stage.close()
        with explained_memory(self._config, "begin_stage"):
            self._stages = (self._loaded.begin_stage(setup),)

    @property
    def _stage(self) -> StageRank:
        return self._stages[0]

    def logprobs(self, share: Share[Sequences]) -> np.ndarray:
        with explained_memory(self._config, "logprobs"):
            return self._stage.learner.logprobs(share)

    def update(self, share: Share[OptimiserStep]) -> RankReport:
        with explained_memory(self._config, "update"):
            return self._stage.learner.update(share)

    def hold(self, shares: list[Share[StoredSequences]], journal: Path | None) -> list[np.ndarray]:
        with explained_memory(self._config, "hold"):
            return self._stage.hold([Share(share.batch.fetched(), share.counts) for share in shares], journal)

    def update_held(self, number: int, advantages: np.ndarray, weights: np.ndarray) -> RankReport:
        with explained_memory(self._config, "update"):
            return self._stage.update(number, advantages, weights)

    def replay(self, journal: Path) -> list[RankReport]:
        with explained_memory(self._config, "replay"):
            return self._stage.replay(journal)

    def master_digests(self) -> dict[str, str]:
        return self._loaded.engine.master_digests()

    def machine(self) -> dict[str, Any]:
        return machine(self._config)

    def save_policy(self, directory: Path) -> None:
        self._loaded.save_policy(directory)

    def save_state(self, directory: Path) -> None:
        self._loaded.save_state(directory)

    def load_state(self, directory: Path) -> None:
        self._loaded.load_state(directory)

    def prepare_weights(self, version: int) -> int:
        return self._sender.prepare_weights(version)

    def send_weights(self) -> None:
        self._sender.send_weights()

    def evidence(self, version: int, probe: Sequence[Sequence[int]]) -> Evidence:
        return self._sender.evidence(version, probe)


class RayLearnerGroup:
    """All learner ranks: deals sequences to them and puts their answers together."""

    _work: WorkModel
    _layers: int

    def __init__(self, cluster: Cluster, config: RunConfig, log_dir: Path) -> None:
        self._config = config
        self._ranks = config.training.ranks
        variables = environment(config.cluster.device, self._ranks) | memory_environment(config.training)
        learners = [role for role in roles(config) if role.name.startswith("learner")]
        self._workers = [
            ray.remote(LearnerWorker)
            .options(**cluster.options(role, variables))
            .remote(rank, config, role.threads, log_dir / f"{role.name}.log")
            for rank, role in enumerate(learners)
        ]

    def join(self) -> None:
        """Form the collective of all ranks."""
        deadline = self._config.cluster.start_deadline_s
        [(address, port)] = gather([self._workers[0].rendezvous.remote()], "start of learner 0", deadline)
        self._all("start of the learners", lambda worker: worker.join.remote(address, port), deadline)

    def load_model(self, model_path: Path) -> None:
        """Load the policy at `model_path` on all ranks."""
        config = policy_config(model_path, trust_remote_code=self._config.model.trust_remote_code)
        self._work = WorkModel.of(config)
        self._layers = config.num_hidden_layers
        deadline = self._config.cluster.start_deadline_s
        self._all("learner load_model", lambda worker: worker.load_model.remote(model_path), deadline)

    def connect(self, engines: list[ActorHandle]) -> None:
        """Open the weight transport to `engines`."""
        deadline = self._config.weight_sync.deadline_s
        width = self._config.rollouts.tensor_parallel_size
        self._all("weight sync: connect", lambda worker: worker.connect.remote(engines, width, deadline), deadline)

    def begin_stage(self, setup: StageSetup) -> None:
        deadline = self._config.cluster.start_deadline_s
        self._all("learner begin_stage", lambda worker: worker.begin_stage.remote(setup), deadline)

    def logprobs(self, batch: Sequences) -> np.ndarray:
        plan = self._plan(batch)
        calls = [w.logprobs.remote(s) for w, s in zip(self._workers, plan.shares(batch), strict=True)]
        out = np.zeros(batch.token_ids.shape, np.float32)
        for index, found in zip(plan.index, self._gathered(calls, "learner logprobs"), strict=True):
            mine = batch.select(index)
            for number, values in zip(index, mine.per_sequence(found), strict=True):
                out[batch.offsets[number] : batch.offsets[number + 1]] = values
        return out

    def update(self, batch: OptimiserStep) -> UpdateReport:
        shares = self._plan(batch).shares(batch)
        calls = [w.update.remote(share) for w, share in zip(self._workers, shares, strict=True)]
        return _report(self._gathered(calls, "learner update"))

    def hold(self, batch: RolloutBatch, parts: Sequence[np.ndarray], journal: Path | None = None) -> RayHeldStep:
        sequences = batch.sequences
        places = [np.flatnonzero(np.isin(sequences.sample_index, part)) for part in parts]
        chosen = [sequences.select(place) for place in places]
        plans = [self._plan(one) for one in chosen]
        dealt = [plan.shares(one) for plan, one in zip(plans, chosen, strict=True)]
        calls = [w.hold.remote([shares[rank] for shares in dealt], journal) for rank, w in enumerate(self._workers)]
        kl = self._gathered(calls, "learner hold")
        # For each optimiser step and rank: the number of the sample of each sequence it holds.
        owners = [[one.sample_index[index] for index in plan.index] for plan, one in zip(plans, chosen, strict=True)]
        return RayHeldStep(self, owners, _sample_sums(owners, kl, len(batch.samples)))

    def update_held(self, number: int, advantages: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> UpdateReport:
        """Optimiser step `number` of the held step; one array over its sequences for each rank."""
        given = zip(self._workers, advantages, weights, strict=True)
        calls = [w.update_held.remote(number, mine, weight) for w, mine, weight in given]
        return _report(self._gathered(calls, "learner update"))

    def replay(self, journal: Path) -> list[UpdateReport]:
        by_rank = self._all("learner replay", lambda worker: worker.replay.remote(journal))
        return [_report(of_update) for of_update in zip(*by_rank, strict=True)]

    def master_digests(self) -> list[dict[str, str]]:
        return self._all("learner digests", lambda worker: worker.master_digests.remote())

    def machines(self) -> list[dict[str, Any]]:
        return self._all("learner machine", lambda worker: worker.machine.remote())

    def save_policy(self, directory: Path) -> None:
        """Write the policy; each layer has the deadline of a collective."""
        deadline = self._config.training.collective_deadline_s * (self._layers + 2)
        self._all("learner save_policy", lambda worker: worker.save_policy.remote(directory), deadline)

    def save_state(self, directory: Path) -> None:
        self._all("learner save_state", lambda worker: worker.save_state.remote(directory))

    def load_state(self, directory: Path) -> None:
        self._all("learner load_state", lambda worker: worker.load_state.remote(directory))

    def prepare_weights(self, version: int) -> int:
        deadline = self._config.weight_sync.deadline_s
        return self._all("weight sync: prepare", lambda worker: worker.prepare_weights.remote(version), deadline)[0]

    def send_weights(self) -> None:
        deadline = self._config.weight_sync.deadline_s
        self._all("weight sync", lambda worker: worker.send_weights.remote(), deadline)

    def evidence(self, version: int, probe: Sequence[Sequence[int]]) -> Evidence:
        return self._all("learner evidence", lambda worker: worker.evidence.remote(version, probe))[0]

    def _plan(self, batch: Sequences | StoredSequences) -> BatchPlan:
        return plan_batch(batch, self._ranks, self._config.token_budget, self._work)

    def _all(self, what: str, call: Callable[[Any], Any], deadline_s: float | None = None) -> list[Any]:
        return self._gathered([call(worker) for worker in self._workers], what, deadline_s)

    def _gathered(self, calls: list[Any], what: str, deadline_s: float | None = None) -> list[Any]:
        return gather(calls, what, deadline_s or self._config.training.collective_deadline_s)


class RayHeldStep:
    """A rollout step whose sequences lie on the learner ranks."""

    def __init__(self, learners: RayLearnerGroup, owners: Sequence[Sequence[np.ndarray]], kl_nats: Tensor) -> None:
        self._learners = learners
        self._owners = owners
        self.kl_nats = kl_nats

    def update(self, number: int, advantages: Tensor, weights: Tensor) -> UpdateReport:
        by_rank = self._owners[number]
        mine = [advantages.numpy()[owner] for owner in by_rank]
        return self._learners.update_held(number, mine, [weights.numpy()[owner] for owner in by_rank])


def _sample_sums(
    owners: Sequence[Sequence[np.ndarray]], values: Sequence[Sequence[np.ndarray]], samples: int
) -> Tensor:
    """[N]: `values[rank][step]` of the sequences, added up by the sample that `owners[step][rank]` names."""
    total = np.zeros(samples)
    for rank, by_step in enumerate(values):
        for step, found in enumerate(by_step):
            np.add.at(total, owners[step][rank], found)
    return torch.from_numpy(total.astype(np.float32))


def _report(reports: Sequence[RankReport]) -> UpdateReport:
    return UpdateReport(
        loss=reports[0].loss,
        grad_norm=reports[0].grad_norm,
        learning_rate=reports[0].learning_rate,
        trained_tokens=sum(report.trained_tokens for report in reports),
        metrics=merged(report.metrics for report in reports),
    )
