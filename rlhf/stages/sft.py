"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import islice

from rlhf.batches.ragged import supervised_sequences
from rlhf.config import SftStage
from rlhf.stages.context import Context, Outcome
from rlhf.stages.offline_metrics import offline_metrics


def run(context: Context, name: str, stage: SftStage) -> Outcome:
    """Trains `stage.steps` optimiser steps and publishes the weights."""
    algorithm = context.algorithm(stage)
    resumed = context.checkpoints.take_resumed(name)
    context.begin_stage(stage, stage.steps, resumed.step)
    examples, phases = context.parts.data.examples(name), context.phases()
    tokens: int = resumed.state.get("trained_tokens", 0)
    deque(islice(examples, resumed.step * stage.batch_size), maxlen=0)  # these have trained
    with context.console.stage(name, stage.steps) as progress, context.checkpoints.steps():
        for step in range(resumed.step, stage.steps):
            phases.start_step()
            with phases("batch"):
                chosen = [next(examples) for _ in range(stage.batch_size)]
                batch = supervised_sequences(chosen, algorithm.sample_weights)
            with phases("update"):
                report = context.parts.learners.update(batch)
            tokens += report.trained_tokens
            metrics = offline_metrics(report, phases)
            context.tracker.log(metrics, stage=name, step=step)
            progress.advance(step + 1, metrics, phases.step)
            context.checkpoints.step_done(name, step + 1, stage.steps, partial(dict, trained_tokens=tokens))
    context.publish()
    return Outcome(stage.steps, tokens)
