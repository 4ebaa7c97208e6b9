"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from rlhf.batches.ragged import supervised_sequences
from rlhf.config import SftStage
from rlhf.stages.context import Context, Outcome
from rlhf.stages.offline_metrics import offline_metrics


def run(context: Context, name: str, stage: SftStage) -> Outcome:
    """Trains `stage.steps` optimiser steps and publishes the weights."""
    algorithm = context.algorithm(stage)
    context.begin_stage(stage, stage.steps)
    examples, phases, tokens = context.parts.data.examples(name), context.phases(), 0
    with context.console.stage(name, stage.steps) as progress:
        for step in range(stage.steps):
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
    context.publish()
    return Outcome(stage.steps, tokens)
