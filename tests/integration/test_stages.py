"""Filter, collect and preference stages from the command line: real Ray, real vLLM, real DeepSpeed, a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.integration

REWARDS = '''
from rewards import reward

@reward("spread")
def spread(sample):
    """Differs between samples, so that an untrained model has something to prefer."""
    return (sum(map(ord, sample.completion)) % 10) / 10
'''

RATE = "optimizer: {learning_rate: 1e-3}"
STAGES = (
    "~stages.rl",
    "stages.sft.steps=10",
    "stages.sft.batch_size=16",
    "stages.sft.optimizer.warmup_steps=0",
    "stages.sft.reasoning_token_ratio=1.5",
    "+stages.filter={kind: filter, prompts: 6, samples_per_prompt: 4}",
    "+stages.first={kind: collect, prompts: 12, samples_per_prompt: 4, weights: {spread: 1.0}}",
    "+stages.second={kind: collect, prompts: 8, samples_per_prompt: 4, reuse: first, reuse_fraction: 0.2}",
    "+stages.quartets={kind: collect, prompts: 8, samples_per_prompt: 5, produce: groups, group_size: 4}",
    f"+stages.dpo={{kind: preference, data: second, batch_size: 4, algorithm: {{name: dpo}}, {RATE}}}",
    f"+stages.simper={{kind: preference, data: first, batch_size: 4, algorithm: {{name: simper}}, {RATE}}}",
    f"+stages.grouper={{kind: preference, data: quartets, batch_size: 4, algorithm: {{name: grouper}}, {RATE}}}",
)


@pytest.fixture
def run(tmp_path: Path):
    (tmp_path / "spread.py").write_text(REWARDS)

    def launch(*overrides: str) -> tuple[str, Path]:
        command = [
            *(sys.executable, "launch.py", "experiment=quickstart", f"run_root={tmp_path}/runs"),
            *(f"cache_root={tmp_path}/cache", f"rewards.modules=[{tmp_path}/spread.py]", "tracking=local"),
            *("rewards.components.spread={weight: 1.0, applies: always}", "rollouts.max_completion_tokens=16"),
            *("evaluation.prompts=4", "evaluation.samples_per_prompt=4", *overrides),
        ]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True, "timeout": 500}
        finished = subprocess.run(command, check=False, **options)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout, tmp_path / "runs" / "latest"

    return launch


def test_the_preference_pipeline_filters_collects_and_trains_on_what_it_collected(run):
    output, folder = run(*STAGES)
    summary = json.loads((folder / "summary.json").read_text())
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert list(stages) == ["sft", "filter", "first", "second", "quartets", "dpo", "simper", "grouper"]
    assert summary["evaluation"].keys() == {"sft", "dpo", "simper", "grouper"}

    counts = stages["filter"]["filter"]
    assert sum(counts["histogram"]) + counts["unscored"] == counts["prompts"] == 6
    assert "kept 6 of 6 prompts" in output
    # What the filter left is all that later stages take.
    for name in ("first", "second", "quartets"):
        assert stages[name]["collect"]["prompts"] == 6

    pairs = parquet.read_table(folder / "preferences" / "first.parquet").to_pylist()
    assert len(pairs) == stages["first"]["collect"]["pairs"] > 0
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert all(dict(pair["chosen_parts"])["spread"] == pair["chosen_reward"] for pair in pairs)
    groups = parquet.read_table(folder / "preferences" / "quartets.parquet").to_pylist()
    assert all(len(group["completions"]) == 4 for group in groups)

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = {name: next(m for m in metrics if m["stage"] == name) for name in ("dpo", "simper", "grouper")}
    # The policy is its own reference before the first update, so every margin is 0 and the loss is log 2.
    assert first["dpo"]["policy/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["dpo"]["preference/margin"] == pytest.approx(0.0, abs=1e-4)
    assert {"preference/accuracy", "preference/chosen_logprob", "preference/rejected_logprob"} <= first["simper"].keys()
    assert {"preference/best_probability", "preference/worst_probability"} <= first["grouper"].keys()
    assert all(first[name]["optim/grad_norm"] > 0 for name in first)


@pytest.mark.slow
def test_reference_log_probs_and_filter_counts_are_computed_once_for_one_model_and_data(run):
    base = ("~stages.rl", "~stages.sft", f"+stages.filter={STAGES[5].partition('=')[2]}")
    file = f"{REPOSITORY}/tests/integration/pairs.jsonl"
    dpo = f"+stages.dpo={{kind: preference, data: {{kind: jsonl, path: {file}}}, algorithm: {{name: dpo}}, {RATE}}}"
    first, folder = run(*base, dpo)
    cache = {path.name: path.stat().st_mtime_ns for path in (folder / "../../cache").resolve().iterdir()}
    assert sorted(name.partition("-")[0] for name in cache) == ["filter", "reference"]
    again, folder = run(*base, dpo)
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "../../cache").resolve().iterdir()} == cache
    for text, reused in ((first, False), (again, True)):
        assert ("filter: counts from" in text) is reused
        assert ("reference log-probs: " in text) is reused
