"""Preference optimisation on stored completions: DPO and SimPER on pairs, GROUPER on groups."""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from rlhf.algorithms.offline import OfflineAlgorithm
from rlhf.batches.ragged import PreferenceSequences, unit_sequences, with_reference
from rlhf.config import PreferenceFile, PreferenceStage
from rlhf.errors import CheckpointError, ConfigError, DataError
from rlhf.preferences import untrainable
from rlhf.samples import PreferenceGroup, PreferencePair, PreferenceUnit
from rlhf.stages.cache import digest, examples_digest, model_digest, read_ragged, write_ragged
from rlhf.stages.context import Context, Outcome
from rlhf.stages.offline_metrics import offline_metrics

_UNITS_AT_ONCE = 256

Units = Sequence[PreferenceUnit]


def run(context: Context, name: str, stage: PreferenceStage) -> Outcome:
    """Trains `stage.epochs` over the units that can train anything, and publishes the weights."""
    algorithm = context.algorithm(stage)
    assert isinstance(algorithm, OfflineAlgorithm)
    collected = context.collected[stage.data] if isinstance(stage.data, str) else None
    found = context.parts.data.preferences(name, stage, collected)
    units, left_out = _trainable(found)
    _check(name, stage, algorithm, found, units, left_out)
    total = optimiser_steps(len(units), stage)
    _check_warm_up(name, stage, total)
    resumed = context.checkpoints.take_resumed(name)
    context.begin_stage(stage, total, resumed.step)
    needed = algorithm.needs.reference_logprobs
    reference = _reference(context, units, stored=resumed.step > 0) if needed else None
    phases = context.phases()
    tokens: int = resumed.state.get("trained_tokens", 0)
    batches = steps(len(units), stage, zlib.crc32(f"{context.config.seed}/{name}".encode()))
    with context.console.stage(name, total) as progress, context.checkpoints.steps():
        for step, chosen in islice(enumerate(batches), resumed.step, None):
            phases.start_step()
            with phases("batch"):
                batch = _batch(algorithm, units, chosen, reference)
            with phases("update"):
                report = context.parts.learners.update(batch)
            tokens += report.trained_tokens
            metrics = offline_metrics(report, phases)
            context.tracker.log(metrics, stage=name, step=step)
            progress.advance(step + 1, metrics, phases.step)
            context.checkpoints.step_done(name, step + 1, total, partial(dict, trained_tokens=tokens))
    context.publish()
    return Outcome(total, tokens, {"units": len(units), "left_out": dict(left_out)})


def optimiser_steps(units: int, stage: PreferenceStage) -> int:
    return math.ceil(units * stage.epochs / stage.batch_size)


def steps(units: int, stage: PreferenceStage, seed: int) -> Iterator[list[int]]:
    """The units of each optimiser step: every epoch in an order of its own; the last step may be smaller."""
    wanted = math.ceil(units * stage.epochs)
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        indices = list(range(units))
        random.Random(f"{seed}/{epoch}").shuffle(indices)
        order, epoch = order + indices, epoch + 1
    for start in range(0, wanted, stage.batch_size):
        yield order[start : min(start + stage.batch_size, wanted)]


def _batch(
    algorithm: OfflineAlgorithm, units: Units, chosen: Sequence[int], reference: list[list[np.ndarray]] | None
) -> PreferenceSequences:
    batch = algorithm.batch([units[index] for index in chosen])
    if reference is None:
        return batch
    return with_reference(batch, np.concatenate([row for index in chosen for row in reference[index]]))


def _reference(context: Context, units: Units, *, stored: bool) -> list[list[np.ndarray]]:
    """Log-probs [T] of every completion of every unit under the weights at the start of the stage.

    They are computed once and kept in `cache_root` under a fingerprint of the weights and of the completions. If they
    must be `stored`, because the learners have trained since, CheckpointError says where they are missing.
    """
    completions = [unit.completions for unit in units]
    flat = [completion for unit in completions for completion in unit]
    config = context.config
    key = digest("reference", model_digest(context.policy), config.model.dtype, examples_digest(flat))
    path = Path(config.cache_root) / f"reference-{key}.npz"
    if path.exists():
        context.console.note(f"reference log-probs: {path}")
        rows = read_ragged(path)
    elif stored:
        raise CheckpointError(
            f"{path}: must be there to resume this stage. It has the log-probs of weights that the learners no longer "
            "hold. Restore cache_root, or remove the checkpoints of this stage to begin it again."
        )
    else:
        rows = list(_computed(context, units))
        write_ragged(path, rows)
    remaining = iter(rows)
    return [[next(remaining) for _ in unit] for unit in completions]


def _computed(context: Context, units: Units) -> Iterator[np.ndarray]:
    with context.phases()("reference"):
        for start in range(0, len(units), _UNITS_AT_ONCE):
            sequences = unit_sequences(units[start : start + _UNITS_AT_ONCE])
            yield from sequences.per_sequence(context.parts.learners.logprobs(sequences))


def _trainable(found: Units) -> tuple[list[PreferenceUnit], Counter[str]]:
    """The units that train something, and how many others there are by reason."""
    reasons = [untrainable(unit) for unit in found]
    kept = [unit for unit, reason in zip(found, reasons, strict=True) if reason is None]
    return kept, Counter(reason for reason in reasons if reason is not None)


def _check(
    name: str,
    stage: PreferenceStage,
    algorithm: OfflineAlgorithm,
    found: Units,
    units: Units,
    left_out: Counter[str],
) -> None:
    source = stage.data.path if isinstance(stage.data, PreferenceFile) else f"the collect stage {stage.data}"
    if not units:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it made none"
        raise DataError(
            f"stages.{name}.data = {source}: must hold at least one pair or group that trains. {why}. Collect from "
            "more prompts, or from harder or easier ones."
        )
    wanted = PreferencePair if algorithm.needs.data == "pairs" else PreferenceGroup
    if not isinstance(found[0], wanted):
        has = "pairs (prompt, chosen, rejected)" if wanted is PreferenceGroup else "groups (completions, rewards)"
        raise DataError(
            f"stages.{name}.data = {source}: must hold {algorithm.needs.data}, which the algorithm trains on. It holds "
            f"{has}. Choose another algorithm or other data."
        )


def _check_warm_up(name: str, stage: PreferenceStage, total: int) -> None:
    if stage.optimizer.warmup_steps > total:
        raise ConfigError(
            [
                f"stages.{name}.optimizer.warmup_steps = {stage.optimizer.warmup_steps}: must be at most the stage's "
                f"{total} optimiser steps. The full learning rate would never be reached. Lower it or train longer."
            ]
        )
