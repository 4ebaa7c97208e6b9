"""Preference data from the current policy: sample, score, pick, write."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

from rlhf.config import CollectStage
from rlhf.errors import DataError, RewardFailureError
from rlhf.preferences import Reason, Selected, pick_all
from rlhf.samples import ScoredGroup
from rlhf.selection import Arrivals
from rlhf.stages.context import Context, Outcome
from rlhf.tracking import sample_rows


def run(context: Context, name: str, stage: CollectStage) -> Outcome:
    """`preferences/<name>.parquet` in the run directory has the picked pairs or groups."""
    data, config = context.parts.data, context.config
    arrivals, groups = Arrivals(), []
    total = data.prompt_count(name, stage)
    with context.phases()("rollout"), context.console.stage(name, total) as progress:

        def advance(done: int) -> None:
            progress.advance(done, arrivals.metrics(), {})

        for scored in data.sampled(name, stage, advance):
            arrivals.add(scored)
            _check_budget(config.rewards.error_budget, arrivals, scored)
            groups.append(scored)
    picked, reasons = pick_all(groups, stage, correct_at=config.rewards.correct_at, seed=config.seed)
    if not picked:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise DataError(
            f"stages.{name}: {len(groups)} prompts gave no {stage.produce} ({why}). Choose other prompts, more "
            "samples, or other rules for chosen and rejected."
        )
    records = picked + _reused(context, stage, len(picked))
    path = context.run_dir / "preferences" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    data.write_preferences(path, records)
    context.collected[name] = path
    context.records[name] = picked
    _log(context, name, arrivals, groups, picked, reasons)
    context.console.note(_described(stage, picked, reasons, len(records) - len(picked), path))
    figures = {"prompts": len(groups), stage.produce: len(records), "without": dict(reasons)}
    return Outcome(0, 0, {"collect": figures | {"reused": len(records) - len(picked)}})


def _reused(context: Context, stage: CollectStage, fresh: int) -> list[Selected]:
    """So many records of an earlier stage that they are `reuse_fraction` of all, or all it has."""
    if stage.reuse is None:
        return []
    earlier = context.records[stage.reuse]
    wanted = round(fresh * stage.reuse_fraction / (1.0 - stage.reuse_fraction))
    return random.Random(f"{context.config.seed}/{stage.reuse}").sample(earlier, min(wanted, len(earlier)))


def _check_budget(budget: float, arrivals: Arrivals, scored: ScoredGroup) -> None:
    samples = len(arrivals.completion_tokens)
    # A first group of eight alone must not stop a run because one reward of it failed.
    if scored.failed and arrivals.failed > budget * max(samples, 1024):
        raise RewardFailureError(
            f"rewards.error_budget = {budget}: {arrivals.failed} of {samples} rewards failed. Last: "
            f"{scored.failure_report}"
        )


def _log(
    context: Context,
    name: str,
    arrivals: Arrivals,
    groups: list[ScoredGroup],
    picked: list[Selected],
    reasons: Counter[Reason],
) -> None:
    counts = {f"collect/without/{reason}": count for reason, count in sorted(reasons.items())}
    context.tracker.log({**arrivals.metrics(), "collect/picked": len(picked), **counts}, stage=name, step=0)
    chosen = {sample for record in picked for sample in record.sample_ids}
    rows = (row for scored in groups for row in sample_rows(scored, None, "", context.config.rewards.correct_at))
    shown = itertools.islice(rows, context.config.tracking.samples_per_table)
    marked = [row | {"ledger_state": "picked" if row["sample_id"] in chosen else "left out"} for row in shown]
    context.tracker.log_samples(marked, stage=name, step=0)


def _described(stage: CollectStage, picked: list[Selected], reasons: Counter[Reason], reused: int, path: Path) -> str:
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    more = f" + {reused} of {stage.reuse}" if reused else ""
    return f"{len(picked)} {stage.produce}{more}; without: {why or 'none'}; {path}"
