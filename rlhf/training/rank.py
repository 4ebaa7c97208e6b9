"""Everything one learner rank does, as plain classes: the Ray shell round them only passes calls on.

A type for each state: a rank that has joined loads a model, a loaded rank sends weights and begins stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from rlhf.algorithms import build
from rlhf.batches.packing import Share
from rlhf.batches.ragged import RolloutSequences, completion_sequences
from rlhf.checkpoints.journal import RankJournal, RankUpdate, read_rows, rows_path
from rlhf.config import RunConfig
from rlhf.models import load_tokenizer, torch_dtype
from rlhf.protocols import StageSetup
from rlhf.samples import TokenizedExample
from rlhf.training.deepspeed_engine import DeepSpeedEngine, FrozenModel, join_process_group
from rlhf.training.learner import Learner, OnlineLearner, RankReport
from rlhf.training.model_files import write_model
from rlhf.training.token_model import Pack
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.source import ZeroWeightSource
from rlhf.weight_sync.transports import EngineClient, open_transport


def join(number: int, config: RunConfig, address: str, port: int) -> None:
    """Make this process rank `number` of the learners' collective."""
    training = config.training
    deadline = training.collective_deadline_s
    join_process_group(number, training.ranks, address, port, config.cluster.device, deadline)


class LoadedRank:
    """One rank of a loaded policy. Methods that touch the model are collective."""

    def __init__(self, number: int, config: RunConfig, model_path: Path) -> None:
        self._number = number
        self._config = config
        self._model_path = model_path
        self.engine = DeepSpeedEngine(model_path, config.model, config.training, config.cluster.device)

    def connect(self, client: EngineClient) -> RankSender:
        """Open the weight transport to the engines."""
        return RankSender(self._number, self._config, self.engine, client)

    def begin_stage(self, setup: StageSetup) -> StageRank:
        """Start a training stage or, after `load_state`, go on with it: with the stage's algorithm and optimiser."""
        self.engine.configure_optimizer(setup.optimizer, fresh=setup.first_step == 0)
        return StageRank(self._number, self._config, self.engine, setup)

    def save_policy(self, directory: Path) -> None:
        """Write the policy in Hugging Face format, the learner's exact bits, with the tokenizer of the base model.

        Layer by layer: no rank holds more than one layer whole. Rank 0 writes.
        """
        source = ZeroWeightSource(self.engine, with_digests=False)
        if self._number == 0:
            write_model(directory, source.iter_groups(), source.metadata(), save_rest=self._save_configuration)
        else:
            for _ in source.iter_groups():  # the others take part in gathering
                pass

    def _save_configuration(self, directory: Path) -> None:
        """The base model's configuration as it was loaded: training's own switches do not belong in it."""
        trusted, policy = self._config.model.trust_remote_code, self.engine.causal_lm
        config = AutoConfig.from_pretrained(self._model_path, trust_remote_code=trusted)
        config.dtype = torch_dtype(self._config.model.dtype)
        config.architectures = [type(policy).__name__]
        config.save_pretrained(directory)
        policy.generation_config.save_pretrained(directory)
        load_tokenizer(self._model_path, trust_remote_code=trusted).save_pretrained(directory)

    def save_state(self, directory: Path) -> None:
        """Write this rank's share of all that the next optimiser step depends on."""
        self.engine.save_state(directory)

    def load_state(self, directory: Path) -> None:
        """Take up the weights and the optimiser as another process left them in `directory`."""
        self.engine.load_state(directory)

    def close(self) -> None:
        """Free the model and its optimiser."""
        self.engine.close()


class StageRank:
    """One rank in a training stage.

    Algorithms over rollouts that need a reference keep a frozen copy of the weights at the start of the stage; those
    over stored completions ask for `learner.logprobs` before their first update instead.
    """

    def __init__(self, number: int, config: RunConfig, engine: DeepSpeedEngine, setup: StageSetup) -> None:
        self._number = number
        self._journals: tuple[RankJournal, ...] = ()
        chosen = setup.algorithm
        algorithm = build(chosen.name, chosen.hyperparameters, chosen.modules)
        temperature = config.rollouts.temperature
        self.learner = Learner(
            engine, algorithm, setup.optimizer, setup.total_steps, temperature, first_step=setup.first_step
        )
        needs = algorithm.needs
        self._reference: FrozenModel | None = None
        if needs.rollouts and needs.reference_logprobs:
            self._reference = FrozenModel(setup.policy, config.model, config.training, config.cluster.device)
        self.online = OnlineLearner(self.learner, self._reference)

    def hold(self, shares: list[Share[RolloutSequences]], journal: Path | None) -> list[np.ndarray]:
        """As `OnlineLearner.hold`. The sequences, and later each update, are written below `journal`, if there is one.

        `journal` is the directory of the step; see `rlhf.checkpoints.journal`.
        """
        self._close_journal()
        if journal is not None:
            self._journals = (RankJournal(rows_path(journal, self._number), shares),)
        return self.online.hold(shares)

    def update(self, number: int, advantages: np.ndarray, weights: np.ndarray) -> RankReport:
        """As `OnlineLearner.update`, journaled before anything changes."""
        for journal in self._journals:
            journal.add(RankUpdate(number, advantages, weights))
        return self.online.update(number, advantages, weights)

    def replay(self, journal: Path) -> list[RankReport]:
        """Train the step in the directory `journal` once more: one report for each update that it had."""
        self._close_journal()
        rows = read_rows(rows_path(journal, self._number))
        self.online.hold(rows.shares)
        return [self.online.update(update.number, update.advantages, update.weights) for update in rows.updates]

    def _close_journal(self) -> None:
        for journal in self._journals:
            journal.close()
        self._journals = ()

    def close(self) -> None:
        """Free the reference model."""
        self._close_journal()
        if self._reference is not None:
            self._reference.close()


class RankSender:
    """One rank's side of the weight sync."""

    def __init__(self, number: int, config: RunConfig, engine: DeepSpeedEngine, client: EngineClient) -> None:
        self._engine = engine
        self._client = client
        self.source = ZeroWeightSource(engine, with_digests=number == 0)
        self.transport = open_transport(client, self.source, number, config)

    def prepare_weights(self, version: int) -> int:
        """Do what of the sync of `version` engines need not wait for. Returns the bytes of one copy."""
        self._client.version = version
        self.transport.prepare()
        return self.source.size_bytes

    def send_weights(self) -> None:
        """Push the prepared weights to every engine."""
        self.transport.send_weights()

    def evidence(self, version: int, probe: Sequence[Sequence[int]]) -> Evidence:
        """The digests of what was last sent and the log-probs of `probe` (temperature 1)."""
        return Evidence(version, [dict(self.transport.digests)], probe_logprobs(self._engine, probe))


@torch.no_grad()
def probe_logprobs(engine: DeepSpeedEngine, probe: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probs at temperature 1 of every token of every sequence, in one pass; the first of each has 0."""
    examples = [TokenizedExample(np.array(tokens, np.int32), np.arange(len(tokens)) > 0) for tokens in probe]
    sequences = completion_sequences(examples)
    found, _ = engine.forward(Pack.of(sequences, engine.device), 1.0)
    values = np.zeros(sequences.token_ids.shape)
    values[sequences.loss_mask] = found.double().cpu().numpy()
    return [part.tolist() for part in sequences.per_sequence(values)]
