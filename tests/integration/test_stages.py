"""What stages keep between runs, from the command line: real Ray, real vLLM, real DeepSpeed, a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_runs import PREFERENCE_STAGES, RATE, REPOSITORY, component, write_rewards

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def run(tmp_path: Path):
    rewards = component(write_rewards(tmp_path), "spread")

    def launch(*overrides: str) -> tuple[str, Path]:
        command = [
            *(sys.executable, "launch.py", "experiment=quickstart", f"run_root={tmp_path}/runs"),
            *(f"cache_root={tmp_path}/cache", *rewards, "tracking=local", "rollouts.max_completion_tokens=16"),
            *("evaluation.prompts=4", "evaluation.samples_per_prompt=4", *overrides),
        ]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True, "timeout": 500}
        finished = subprocess.run(command, check=False, **options)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout, tmp_path / "runs" / "latest"

    return launch


def test_reference_log_probs_and_filter_counts_are_computed_once_for_one_model_and_data(run):
    [stage] = [override for override in PREFERENCE_STAGES if override.startswith("+stages.filter=")]
    base = ("~stages.rl", "~stages.sft", stage)
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
