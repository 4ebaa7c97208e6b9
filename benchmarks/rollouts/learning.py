"""What the ways to sample do to learning: whole RL runs of the tiny model from one SFT base, attested at each sync.

Staleness 0, 1 and 4 over the same seeds; then, with one seed: two engines, tensor parallel 2, the key-value cache kept
over a sync, and completions that go on under new weights and lose the tokens that are too old.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.rollouts.runs import launch, step_lines, summary, tiny_model

STALENESS = (0, 1, 4)
STEPS = 40
EVALUATION = ("++evaluation.prompts=200", "++evaluation.samples_per_prompt=4")
VARIANTS = {
    "two_engines": ("+rollouts.num_engines=2",),
    "tensor_parallel_2": ("+rollouts.tensor_parallel_size=2",),
    "kept_cache": ("+rollouts.max_staleness=1", "++weight_sync.kv_cache=keep"),
    "masked": ("+rollouts.max_staleness=1", "+rollouts.late_groups=mask"),
}


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """One row for each run; gains are in mean accuracy of sampled answers to held-out problems."""
    seeds = range(1 if quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = tiny_model(root / "base", *EVALUATION)
        before = summary(root / "base")["evaluation"]["sft"]["pass@1"]
        rows = [
            {"staleness": staleness, "seed": seed} | train(root, model, seed, f"+rollouts.max_staleness={staleness}")
            for seed in seeds
            for staleness in STALENESS
        ]
        variants = {name: train(root, model, 0, *settings) for name, settings in VARIANTS.items()}
    for row in [*rows, *variants.values()]:
        row["gain"] = row["accuracy"] - before
    gains = {s: [row["gain"] for row in rows if row["staleness"] == s] for s in STALENESS}
    figures = {f"gain_staleness_{s}": fmean(gains[s]) for s in STALENESS}
    figures |= {f"gain_{name}": row["gain"] for name, row in variants.items()}
    if len(seeds) > 1:
        for s in STALENESS[1:]:
            differences = [late - fresh for late, fresh in zip(gains[s], gains[0], strict=True)]
            figures[f"gain_staleness_{s}_less_0"] = fmean(differences)
            figures[f"gain_staleness_{s}_less_0_stderr"] = stdev(differences) / len(differences) ** 0.5
    return {"before": before, "rows": rows, "variants": variants, "figures": figures}


def train(root: Path, model: Path, seed: int, *settings: str) -> dict[str, Any]:
    """One run and what it reached. A sync that is not attested ends it with an error."""
    runs = root / "rl"
    launch(
        "experiment=algorithms_online",
        f"model.path={model}",
        f"seed={seed}",
        f"stages.rl.steps={STEPS}",
        "tracking=local",
        f"run_root={runs}",
        *EVALUATION,
        *settings,
    )
    lines = step_lines(runs)
    return {
        "accuracy": summary(runs)["evaluation"]["rl"]["pass@1"],
        "attested_syncs": sum("sync/probe_max_gap_nats" in line for line in lines),
        "staleness_mean": fmean(line["staleness/mean_steps"] for line in lines),
        "staleness_max": max(line["staleness/max_steps"] for line in lines),
        "step_s": (lines[-1]["time_s"] - lines[0]["time_s"]) / (len(lines) - 1),
    }
