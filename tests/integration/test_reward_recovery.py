"""Runs whose reward workers or reward service are killed in the middle: every sample still has its one outcome."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from rlhf.weight_sync.transports import free_port
from tests.integration.test_runs import REPOSITORY, component, finish, left_behind, metrics, ray_folders, start

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 8
SLOW = """
import time
from rewards import reward

@reward("slow")
def slow(sample):
    time.sleep(0.05)
    return (sum(map(ord, sample.completion)) % 10) / 10
"""


@pytest.fixture
def slow_reward(tmp_path: Path) -> Path:
    path = tmp_path / "slow_reward.py"
    path.write_text(SLOW)
    return path


def wait_for_rl(root: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not (root / "latest" / "metrics.jsonl").exists() or not metrics(root, "rl"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)


def reward_actors(process: subprocess.Popen) -> list[psutil.Process]:
    """Those of this run: others may run beside it."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "".join(child.cmdline()).startswith("ray::RewardWorker")]


def check_everything_has_an_outcome(root: Path) -> None:
    """The run did all its steps, its counts add up, and no reward failed or became a 0 that the function never gave."""
    summary = json.loads((root / "latest" / "summary.json").read_text())
    ledger = summary["rl"]["ledger"]
    assert summary["rl"]["steps"] == STEPS
    assert ledger["trained"] == STEPS * 4
    assert ledger["trained"] + ledger["filtered"] == ledger["dispatched"]
    assert (ledger["lost"], ledger["reward_error"], ledger["in_flight"]) == (0, 0, 0)
    assert all(record["reward/failed"] == 0 for record in metrics(root, "rl") if "reward/failed" in record)
    for row in map(json.loads, (root / "latest" / "samples.jsonl").read_text().splitlines()):
        assert row["parts"]["slow"] == sum(map(ord, row["completion"])) % 10 / 10


def test_a_reward_worker_killed_in_mid_run_is_replaced_and_no_sample_is_lost(tmp_path, slow_reward):
    root, folders = tmp_path / "runs", ray_folders()
    schedule = "rewards.components.slow.weight_schedule=[[0,0.0],[20,1.0]]"
    process = start(root, *component(slow_reward, "slow"), f"stages.rl.steps={STEPS}", schedule)
    wait_for_rl(root, process)
    (actor,) = reward_actors(process)
    actor.kill()
    code, output = finish(process)
    assert code == 0, output
    check_everything_has_an_outcome(root)
    weights = [record["reward/weight/slow"] for record in metrics(root, "rl") if "reward/weight/slow" in record]
    assert len(weights) == STEPS
    assert [later - sooner for sooner, later in pairwise(weights)] == pytest.approx([1 / 20] * (STEPS - 1))
    assert left_behind(root, folders) == []


def test_a_reward_service_that_is_killed_and_started_again_costs_no_sample(tmp_path, slow_reward):
    root, port = tmp_path / "runs", free_port()
    service = serve(slow_reward, port)
    url = f"http://127.0.0.1:{port}/score/slow"
    settings = f"rewards.components.slow={{weight: 1.0, applies: always, url: '{url}', retries: 10, deadline_s: 120}}"
    process = start(root, settings, f"stages.rl.steps={STEPS}")
    restarted: list[subprocess.Popen] = []

    def start_again() -> None:
        restarted.append(serve(slow_reward, port))

    try:
        wait_for_rl(root, process)
        os.killpg(service.pid, signal.SIGKILL)
        service.wait()
        timer = threading.Timer(2.0, start_again)
        timer.start()
        code, output = finish(process)
        timer.join()
    finally:
        for one in (service, *restarted):
            one.poll() is None and os.killpg(one.pid, signal.SIGKILL)
            one.wait()
    assert code == 0, output
    assert restarted
    check_everything_has_an_outcome(root)


def serve(module: Path, port: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "rewards",
        "serve",
        "--rewards",
        "slow",
        "--module",
        str(module),
        "--port",
        str(port),
    ]
    service = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert service.stderr is not None
    assert re.search(r"serving slow at http", service.stderr.readline())
    threading.Thread(target=service.stderr.read, daemon=True).start()
    return service
