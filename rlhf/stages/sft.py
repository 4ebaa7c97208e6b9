"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from rlhf.batches import supervised_batch
from rlhf.config import SftStage
from rlhf.stages.context import Context, Outcome
from rlhf.stages.offline_metrics import offline_metrics


def run(context: Context, name: str, stage: SftStage) -> Outcome:
    """Trains `stage.steps` optimiser steps and publishes the weights."""
    algorithm = context.algorithm(stage)
    context.load(stage, stage.optimizer, stage.steps)
    examples, phases, tokens = context.parts.data.examples(name), context.phases(), 0
    with context.console.stage(name, stage.steps) as progress:
        for step in range(stage.steps):
            phases.start_step()
            with phases("batch"):
                batch = supervised_batch([next(examples) for _ in range(stage.batch_size)], algorithm.token_weights)
            with phases("update"):
                report = context.parts.learners.update(batch)
            tokens += report.trained_tokens
            metrics = offline_metrics(report, phases)
            context.tracker.log(metrics, stage=name, step=step)
            progress.advance(step + 1, metrics, phases.step)
    context.publish()
    return Outcome(stage.steps, tokens)
