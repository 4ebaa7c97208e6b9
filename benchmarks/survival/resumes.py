"""Runs of SFT, RL and DPO on the real stack, killed with their whole process tree at random moments and resumed."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.isolated import REPOSITORY
from rlhf import jsonl
from rlhf.ledger import STATES

KILLS = 20
RL_STEPS, PROMPTS = 12, 4
EXPERIMENT = (
    "experiment=quickstart",
    "stages.sft.steps=20",
    "stages.sft.batch_size=16",
    "stages.sft.optimizer.warmup_steps=0",
    f"stages.rl.steps={RL_STEPS}",
    f"stages.rl.prompts_per_step={PROMPTS}",
    "stages.rl.evaluate_every=0",
    "stages.rl.optimizer.warmup_steps=0",
    "algorithm.group_filter=none",
    "+rewards.components.conciseness={params: {target_tokens: 1, max_tokens: 16}, applies: always}",
    "rollouts.group_size=4",
    "rollouts.max_completion_tokens=16",
    "evaluation.prompts=8",
    "evaluation.samples_per_prompt=4",
    "checkpoints.every_steps=3",
    "tracking=local",
)
DPO = (
    "+stages.dpo={{kind: preference, data: {{kind: jsonl, path: {path}}}, batch_size: 2, epochs: 16, "
    "algorithm: {{name: dpo}}, optimizer: {{learning_rate: 1e-3}}}}"
)
PAIRS = REPOSITORY / "tests" / "integration" / "pairs.jsonl"
_LONGEST_S = 300.0
_REPLAYED = re.compile(r"steps (\d+) to (\d+) were trained again from the journal; (.)")


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """Kill and resume runs, half of them synchronous, until there were as many kills as asked."""
    wanted, found = (3 if quick else KILLS), Tally()
    chance = random.Random(0)
    before = leftovers()
    with tempfile.TemporaryDirectory(prefix="survival-") as folder:
        number = 0
        while found.kills < wanted:
            survive(Path(folder) / str(number), number % 2, wanted, found, chance)
            number += 1
    figures = {
        "faults": found.kills,
        "resumes": found.kills,
        "resumes_exact": found.kills - len(found.differences),
        "groups_lost": found.groups_lost,
        "trained_twice": found.trained_twice,
        "hangs": found.hangs,
        "left_behind": len(leftovers() - before),
    }
    details = {
        "runs": number,
        "steps_replayed": found.steps_replayed,
        "steps_made_again": found.steps_made_again,
        "killed_in": dict(found.killed_in),
        "differences": found.differences,
    }
    return {"rows": details, "figures": figures}


@dataclass(slots=True)
class Tally:
    """Sums over all runs."""

    kills: int = 0
    hangs: int = 0
    groups_lost: int = 0
    trained_twice: int = 0
    steps_replayed: int = 0
    steps_made_again: int = 0
    killed_in: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def survive(root: Path, staleness: int, wanted: int, tally: Tally, chance: random.Random) -> None:
    """One run from start to end, killed at random moments until there are enough."""
    root.mkdir()
    command = [*EXPERIMENT, DPO.format(path=PAIRS), f"rollouts.max_staleness={staleness}"]
    command += [f"run_root={root}", f"cache_root={root}/cache", "resume=auto"]
    killed = True
    while killed:  # the last run goes to its end, too
        log = root / f"output-{tally.kills:03d}.log"
        killed = started(command, log, root, chance if tally.kills < wanted else None, tally)
    check(root, tally)


def started(command: Sequence[str], log: Path, root: Path, chance: random.Random | None, tally: Tally) -> bool:
    """Start or resume the run. True if it was killed: at a moment of `chance` once it has written something."""
    with log.open("w") as output:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            [sys.executable, "launch.py", *command], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
        )
    records, moment = root / "latest" / "metrics.jsonl", None
    size = records.stat().st_size if records.exists() else 0
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < _LONGEST_S:
        if chance and moment is None and records.exists() and records.stat().st_size > size:
            moment = time.monotonic() + chance.uniform(0.0, 8.0)
        if moment is not None and time.monotonic() > moment:
            break
        time.sleep(0.01)
    if process.poll() is None:
        tally.hangs += moment is None
        tally.killed_in[doing(root / "latest")] += 1
        kill_tree(process.pid)
        process.wait()
        tally.kills += 1
        return True
    if process.returncode:
        tally.differences.append(log.read_text()[-1500:])
        raise RuntimeError(f"a run ended with status {process.returncode}:\n{tally.differences[-1]}")
    return False


def kill_tree(pid: int) -> None:
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def doing(run: Path) -> str:
    """The stage of the last record, and whether a file was being written."""
    lines = list(jsonl.read(run / "metrics.jsonl"))
    writing = any(run.glob("checkpoints/.*-*")) or any(run.glob(".policy-*")) or any(run.glob("policies/.*-*"))
    stage = str(lines[-1]["stage"]) if lines else "start"
    return f"{stage}, while writing" if writing else stage


def check(root: Path, tally: Tally) -> None:
    """Add what the records of a run that has ended show."""
    run = (root / "latest").resolve()
    events = list(jsonl.read(run / "ledger.jsonl"))
    dispatched = Counter(event["group_id"] for event in events if event["event"] == "dispatched")
    ended = Counter(event["group_id"] for event in events if event["event"] in STATES)
    tally.groups_lost += sum((dispatched - ended).values()) + sum((ended - dispatched).values())
    by_step = Counter(event["detail"] for event in events if event["event"] == "trained")
    tally.trained_twice += sum(abs(by_step[step] - PROMPTS) for step in range(RL_STEPS))
    for log in sorted(root.glob("output-*.log")):
        # The console breaks long lines.
        for first, last, proof in _REPLAYED.findall(" ".join(log.read_text().split())):
            tally.steps_replayed += int(last) - int(first) + 1
            if proof != "e":  # "every tensor has the recorded bits"
                tally.differences.append(f"{log.name}: steps {first} to {last} by losses only")
    made = {(line["stage"], line["step"]): line for line in _updates(run / "metrics.jsonl")}
    for line in _updates(run / "metrics.discarded.jsonl"):
        tally.steps_made_again += 1
        again = made[line["stage"], line["step"]]
        # A step of RL that was not journaled has other samples the second time.
        if line["stage"] != "rl" and _bits(line) != _bits(again):
            tally.differences.append(f"{line['stage']} step {line['step']}: {_bits(line)} and {_bits(again)}")


def _updates(path: Path) -> Iterator[Mapping[str, Any]]:
    return (line for line in jsonl.read(path) if "optim/grad_norm" in line) if path.exists() else iter(())


def _bits(line: Mapping[str, Any]) -> tuple[float, float]:
    return line["policy/loss"], line["optim/grad_norm"]


def leftovers() -> set[str]:
    """What a run could leave: processes of Ray or of ours, folders of sessions, shared memory."""
    commands = [(process.pid, " ".join(process.info["cmdline"] or ())) for process in psutil.process_iter(["cmdline"])]
    names = ("launch.py", "raylet", "gcs_server", "ray::", "EngineCore")
    processes = {f"process {pid}" for pid, command in commands if any(name in command for name in names)}
    folders = {str(path) for path in Path("/tmp").glob("groupwise-*")}
    return processes | folders | {str(path) for path in Path("/dev/shm").iterdir()}
