"""The algorithm of the README, in a folder of the user's own: one file, one yaml, trained on the real stack."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.integration

SMALL = (
    "experiment=quickstart",
    "~stages.sft",
    "stages.rl.steps=1",
    "stages.rl.prompts_per_step=4",
    "stages.rl.evaluate_every=0",
    "stages.rl.optimizer.warmup_steps=0",
    "rollouts.group_size=4",
    "rollouts.max_completion_tokens=8",
    "evaluation.prompts=4",
    "evaluation.samples_per_prompt=4",
    "tracking=local",
)


def test_the_readmes_algorithm_trains_from_a_folder_outside_the_repository(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    [code] = re.findall(r"```python\n(# mine/reinforce\.py\n.*?)```", readme, re.DOTALL)
    [yaml] = re.findall(r"```yaml\n(# mine/algorithm/reinforce\.yaml\n.*?)```", readme, re.DOTALL)
    (tmp_path / "mine" / "algorithm").mkdir(parents=True)
    (tmp_path / "mine" / "reinforce.py").write_text(code)
    (tmp_path / "mine" / "algorithm" / "reinforce.yaml").write_text(yaml)
    command = [sys.executable, REPOSITORY / "launch.py", "--config-dir", "mine", "algorithm=reinforce", *SMALL]
    finished = subprocess.run(
        [*map(str, command), "algorithm.offset=0.3", "run_root=runs"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    run = tmp_path / "runs" / "latest"
    [step] = [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "policy/loss" in r]
    # Nothing is correct after no training: every advantage is -0.3.
    assert step["advantage/abs_mean"] == pytest.approx(0.3, abs=0.05)
    assert step["optim/grad_norm"] > 0
    assert json.loads((run / "summary.json").read_text())["rl"]["ledger"]["trained"] == 4
