"""The Ray shell: real actors, real groups."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf.config import RewardsConfig
from rlhf.samples import Prompt, RewardValue, TextGroup, TextSample

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_workers_score_groups_and_leave_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewards.worker import spawn

    (tmp_path / "mine.py").write_text(
        "import os, time\nfrom rewards import Score, reward\n@reward\ndef grader_pid(sample):\n"
        "    if sample.final == 'hang': time.sleep(600)\n    return Score(1.0, str(os.getpid()))\n"
    )
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).resolve().parents[2]
    ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(root)}})
    try:
        component = {"grader_pid": {"deadline_s": 0.5, "retries": 0, "path": "mine.py:grader_pid"}}
        config = RewardsConfig.model_validate({"components": component})
        (worker,) = spawn(config, 1, {"num_cpus": 0})
        assert ray.get(worker.ping.remote(), timeout=60)
        first, failed, last = ray.get(worker.score.remote(group("a", "hang", "b")), timeout=60).outcomes
        assert isinstance(first, RewardValue)
        assert isinstance(last, RewardValue)
        assert "deadline" in failed.message
        assert ray.get(worker.metrics.remote(), timeout=60)["reward_service/grader_pid/errors/timeout"] == 1
        assert ray.get(worker.health.remote(), timeout=60).answered == 1
        pids = {first.reason, last.reason}
        assert len(pids) == 2
        ray.kill(worker)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    finally:
        ray.shutdown()


def group(*completions: str) -> TextGroup:
    prompt = Prompt("p0", ({"role": "user", "content": "?"},), "42", "grader_pid")
    samples = tuple(TextSample(f"s{number}", text, 1, False) for number, text in enumerate(completions))
    return TextGroup("g0", prompt, False, 0, samples)
