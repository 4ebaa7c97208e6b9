"""Everything one learner rank does, as a plain class: the Ray shell round it only passes calls on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.algorithms import build
from rlhf.batches import Batch, Rows
from rlhf.config import AlgorithmConfig, OptimizerConfig, RunConfig
from rlhf.losses.logprobs import token_logprobs
from rlhf.models import load_tokenizer
from rlhf.training.deepspeed_engine import DeepSpeedEngine, FrozenModel, join_process_group
from rlhf.training.learner import Learner, RankReport
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.source import ZeroWeightSource
from rlhf.weight_sync.transports import EngineClient, Transport, open_transport


class LearnerRank:
    """Holds one rank's engine, learner and weight transport. Methods that touch the model are collective."""

    def __init__(self, rank: int, config: RunConfig) -> None:
        self._number = rank
        self._config = config
        self._model_path: Path | None = None
        self._engine: DeepSpeedEngine | None = None
        self._reference: FrozenModel | None = None
        self._learner: Learner | None = None
        self._client: EngineClient | None = None
        self._transport: Transport | None = None
        self._source: ZeroWeightSource | None = None

    def join(self, address: str, port: int) -> None:
        config = self._config
        join_process_group(
            self._number,
            config.training.ranks,
            address,
            port,
            config.cluster.device,
            config.training.collective_deadline_s,
        )

    def load(self, model_path: Path, optimizer: OptimizerConfig, total_steps: int, chosen: AlgorithmConfig) -> None:
        """Start a stage: the weights at `model_path`, a fresh optimiser and the stage's algorithm.

        Algorithms over rollouts that need a reference keep a frozen copy of these weights; those over stored
        completions ask for `logprobs` before their first update instead.
        """
        config = self._config
        algorithm = build(chosen.name, chosen.hyperparameters, chosen.modules)
        self.close()
        self._model_path = model_path
        self._engine = DeepSpeedEngine(model_path, config.model, config.training, optimizer, config.cluster.device)
        self._learner = Learner(
            self._engine,
            algorithm,
            optimizer,
            total_steps,
            config.training.micro_batch_size,
            config.rollouts.temperature,
        )
        if algorithm.needs.rollouts and algorithm.needs.reference_logprobs:
            self._reference = FrozenModel(model_path, config.model, config.training, self._engine.device)
        if self._source is not None:
            self._source.rebind(self._engine)

    def connect(self, client: EngineClient) -> None:
        self._client = client
        self._source = ZeroWeightSource(self._loaded, with_digests=self._number == 0)
        self._transport = open_transport(client, self._source, self._number, self._config)

    def logprobs(self, batch: Rows, micro_batches_run: int) -> Tensor:
        assert self._learner is not None
        return self._learner.logprobs(batch, micro_batches_run)

    def reference_logprobs(self, batch: Rows, micro_batches_run: int) -> Tensor:
        assert self._learner is not None and self._reference is not None
        return self._learner.logprobs(batch, micro_batches_run, self._reference)

    def update(self, batch: Batch, micro_batches_run: int) -> RankReport:
        assert self._learner is not None
        return self._learner.update(batch, micro_batches_run)

    def send_weights(self, version: int) -> int:
        """Push the weights to every engine as `version`. Returns the bytes of one copy."""
        assert self._transport is not None and self._client is not None and self._source is not None
        self._client.version = version
        # A transport that sends something else than a fresh read of the weights must not pass for one that did.
        self._source.digests = {}
        self._transport.send_weights()
        sizes = (meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in self._source.metadata())
        return sum(sizes)

    @torch.no_grad()
    def evidence(self, version: int, probe: Sequence[Sequence[int]]) -> Evidence:
        """The digests of what was last sent and the log-probs of `probe` (temperature 1)."""
        assert self._source is not None
        values = []
        for tokens in probe:
            token_ids = torch.tensor([list(tokens)])
            logits = self._loaded.logits(token_ids, torch.tensor([len(tokens)]))
            values.append(token_logprobs(logits, token_ids.to(logits.device))[0].tolist())
        return Evidence(version, [dict(self._source.digests)], values)

    def save_policy(self, directory: Path) -> None:
        """Write the policy in Hugging Face format, the learner's exact bits, with the tokenizer of the base model."""
        tensors: dict[str, Tensor] = {}
        for group in ZeroWeightSource(self._loaded, with_digests=False).iter_groups():
            if self._number == 0:
                tensors |= {name: tensor.cpu() for name, tensor in group.items()}
        if self._number == 0:
            assert self._model_path is not None
            trusted = self._config.model.trust_remote_code
            self._loaded.module.save_pretrained(directory, state_dict=tensors)
            load_tokenizer(self._model_path, trust_remote_code=trusted).save_pretrained(directory)

    def close(self) -> None:
        """Free the model, its optimiser and the reference."""
        if self._reference is not None:
            self._reference.close()
            self._reference = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def _loaded(self) -> DeepSpeedEngine:
        assert self._engine is not None, "load comes first"
        return self._engine
