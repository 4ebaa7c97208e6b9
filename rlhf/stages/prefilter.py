"""Prompts that the current policy finds too easy, or too hard, are left out of later stages."""

from __future__ import annotations

from pathlib import Path

from rlhf.checkpoints.directories import written
from rlhf.config import FilterStage
from rlhf.errors import DataError
from rlhf.filtering import FilterReport, cache_key
from rlhf.stages.cache import model_digest
from rlhf.stages.context import Context, Outcome


def run(context: Context, name: str, stage: FilterStage) -> Outcome:
    """Later stages over the same data take only the prompts that are left; the counts are kept in `cache_root`."""
    data, config = context.parts.data, context.config
    mode = f"reasoning {config.rollouts.reasoning_fraction}"
    key = cache_key(model_digest(context.policy), data.fingerprint(name), config, stage, mode)
    path = Path(config.cache_root) / f"filter-{key}.json"
    if path.exists():
        context.console.note(f"{name}: counts from {path}")
        report = FilterReport.from_json(path.read_text(), stage)
    else:
        report = _sampled(context, name, stage)
        with written(path) as unfinished:
            unfinished.write_text(report.to_json())
    for line in report.describe():
        context.console.note(line)
    counts: dict[str, int] = dict(report.counts.items())
    context.tracker.log({f"filter/{verdict}": count for verdict, count in counts.items()}, stage=name, step=0)
    if not report.kept:
        raise DataError(
            f"stages.{name}: must leave at least one prompt. All {len(report.correct)} are too easy or too hard. "
            "Choose other prompts or other thresholds."
        )
    context.keep(name, report.kept)
    figures = {"prompts": len(report.correct), "histogram": list(report.histogram), **counts}
    return Outcome(0, 0, {"filter": figures})


def _sampled(context: Context, name: str, stage: FilterStage) -> FilterReport:
    data = context.parts.data
    with context.phases()("rollout"), context.console.stage(name, data.prompt_count(name, stage)) as progress:
        groups = data.sampled(name, stage, lambda done: progress.advance(done, {}, {}))
        return FilterReport.of(groups, stage, context.config.rewards.correct_at)
