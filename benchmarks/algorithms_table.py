"""Train every algorithm from the same SFT base and write what each gains as a table.

    make algorithms-table                                  in the background: all algorithms, seeds 0 1 2
    make algorithms-table FOREGROUND=1 ARGS="--only grpo dpo --seeds 0"
    make algorithms-table FOREGROUND=1 ARGS=--render       docs/algorithms_table.md from what is there

One run at a time. Results are in benchmarks/results/algorithms.json under `algorithm/seed/hash of the configuration`;
what has finished is never run again, what failed is tried again by the next call.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from types import FrameType
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf import algorithms
from rlhf.algorithms.page import default_needs
from rlhf.config import PreferenceStage, RlStage, RunConfig
from rlhf.validation import validate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "algorithms.json"
REMARKS = RESULTS.with_suffix(".md")  # what a person has to say of these results
PAGE = ROOT / "docs" / "algorithms_table.md"
RUNS = Path("runs/algorithms_table")  # relative to ROOT, where every command runs
BASE = "sft"
TAIL_LINES = 40
SIGNIFICANT = 2.0  # standard errors
TINY = 1e-9  # where every prompt is solved, or none, before and after: no error, and JSON has no NaN

OVERRIDES: Mapping[str, tuple[str, ...]] = {
    # Two optimiser steps for each rollout step: with one, pi_theta = pi_prox throughout and no clip can ever act.
    "grpo": ("++stages.rl.updates_per_step=2",),
    "grpo_icepop": ("++stages.rl.updates_per_step=2",),
    "dr_grpo": ("++stages.rl.updates_per_step=2",),
    "dapo": ("++stages.rl.updates_per_step=2",),
    # Half the rate of the others: its ratio has no lower bound, so the second of two optimiser steps goes on pushing
    # tokens down that the clips of the others have let go. At 2e-4 it gained 1.8 standard errors on seed 2.
    "cispo": ("++stages.rl.updates_per_step=2", "++stages.rl.optimizer.learning_rate=1e-4"),
    # One: its bounds of 3e-4 are for sequences of thousands of tokens. At twenty tokens and this learning rate the
    # first of two optimiser steps moves most sequences past them, and the second would train on almost nothing.
    "gspo": ("++stages.rl.updates_per_step=1",),
    # Samples one version old: on fresh ones its ratio is 1 and its truncation can never act.
    "agapo_offpolicy": ("++rollouts.max_staleness=1",),
    # Its loss has no bound and can push both completions down: half the rate of the online runs, and the NLL of the
    # chosen one. Without that term greedy accuracy rose on seed 1 (.385 to .695) but pass@1 did not (.523 to .522).
    "dpo": ("++stages.preference.optimizer.learning_rate=1e-4", "++algorithm.nll_weight=1.0"),
    # Their losses are bounded, but first the rejected completions fall and take the chosen ones along; those only rise
    # once the rejected ones are near 0. Three epochs end before that: SimPER gained .007 on seed 2 and GROUPER .019.
    "simper": ("++stages.preference.optimizer.learning_rate=3e-4", "++stages.preference.epochs=12"),
    "grouper": (
        "++stages.preference.optimizer.learning_rate=3e-4",
        "++stages.preference.epochs=12",
        "++stages.collect.produce=groups",
    ),
}
"""What a run has that the others have not, and why. `++`, because most keys are defaults that no yaml names."""

NOT_OF_THE_RESULT = ("run_root", "cache_root", "min_free_disk_mib", "dry_run", "tracking", "algorithm")
"""Sections that the hash leaves out; of the algorithm it has the built object, defaults included."""

Row = dict[str, Any]
Rows = dict[str, Row]


# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One run: the arguments of launch.py without `run_root`, and where it writes, relative to ROOT."""

    algorithm: str
    seed: int
    arguments: tuple[str, ...]
    digest: str

    @property
    def key(self) -> str:
        return f"{self.algorithm}/{self.seed}/{self.digest}"

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.algorithm}-seed{self.seed}-{self.digest}"

    @property
    def policy(self) -> Path:
        return self.folder / "latest" / "policy"

    @property
    def command(self) -> list[str]:
        return ["python", "launch.py", *self.arguments, f"run_root={self.folder}"]


def base_job(seed: int) -> Job:
    arguments = ("experiment=algorithms_base", f"seed={seed}", "tracking=local")
    return Job(BASE, seed, arguments, digest(composed(arguments)))


def job(name: str, base: Job) -> Job:
    """The run of algorithm `name` from the policy of `base`; its hash covers that of the base."""
    rollouts = default_needs(algorithms.algorithm(name)).rollouts
    experiment = "algorithms_online" if rollouts else "algorithms_offline"
    arguments = (
        f"experiment={experiment}",
        f"algorithm={name}",
        f"model.path={base.policy}",
        f"seed={base.seed}",
        "tracking=local",
        *OVERRIDES.get(name, ()),
    )
    return Job(name, base.seed, arguments, digest(composed(arguments)))


def benchmarked() -> list[str]:
    """Registered algorithms that start from the base."""
    return [name for name in algorithms.names() if name != BASE]


def composed(arguments: Sequence[str]) -> RunConfig:
    """The checked configuration of a run. ConfigError when it cannot run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", overrides=list(arguments))
    raw: Any = OmegaConf.to_container(config, resolve=True)
    return validate(raw)


def digest(config: RunConfig) -> str:
    """12 hex digits of what decides the result: settings, the algorithm's own fields, and the base by its path."""
    # Without defaults: a new field of the schema must not make every row of the past one that was never run.
    values = config.model_dump(mode="json", exclude=set(NOT_OF_THE_RESULT), exclude_defaults=True)
    values["algorithms"] = {}
    for name, stage in config.stages.items():
        if isinstance(stage, RlStage | PreferenceStage):
            chosen = config.algorithm_of(stage)
            built = algorithms.build(chosen.name, chosen.hyperparameters)
            values["algorithms"][name] = [chosen.name, built.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


# --- running ----------------------------------------------------------------------------------------------------------


def run_all(names: Sequence[str], seeds: Sequence[int]) -> int:
    """Every run that has not finished. Returns how many failed; nothing depends on a failed one but its own seed."""
    failed = 0
    for seed in seeds:
        base = base_job(seed)
        missing = [name for name in names if not finished(load().get(job(name, base).key))]
        print(f"seed {seed}: {len(names) - len(missing)} of {len(names)} finished earlier", flush=True)
        if names and not missing:
            continue
        if not ensure(base, None):
            failed += 1
            continue
        before = load()[base.key]
        failed += sum(not ensure(job(name, base), before) for name in missing)
    return failed


def ensure(wanted: Job, before: Row | None) -> bool:
    """Whether `wanted` has finished, now or earlier; its row is on disk either way."""
    row = load().get(wanted.key)
    # The base is needed as a checkpoint, which somebody may have deleted.
    if finished(row) and (before is not None or (ROOT / wanted.policy).exists()):
        print(f"{wanted.key}: finished earlier")
        return True
    print(f"{wanted.key}: {' '.join(wanted.command)}", flush=True)
    log = ROOT / wanted.folder / "output.log"
    started = time.monotonic()
    status = execute(wanted.command, log)
    seconds = time.monotonic() - started
    row = success(wanted, before, seconds) if status == 0 else failure(wanted, status, log, seconds)
    store(wanted.key, row)
    print(f"{wanted.key}: {brief(row)}", flush=True)
    return finished(row)


def execute(command: Sequence[str], log: Path) -> int:
    """Exit status of the command, whose output is in `log`. A KeyboardInterrupt ends it first, and is passed on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        # In a group of its own: Ctrl-C reaches it once, from here, and it can clean up in peace.
        process = subprocess.Popen(
            [sys.executable, *command[1:]], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def success(done: Job, before: Row | None, seconds: float) -> Row:
    """The row of a run that ended well."""
    run_dir = ROOT / done.folder / "latest"
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    after = next(reversed(summary["evaluation"].values()))
    row = identity(done, "finished", seconds) | {"code": summary["versions"].get("code", "unknown")}
    row |= {"after": figures(after), "completion_tokens": after["completion_tokens_mean"]}
    row |= costs(composed(done.arguments), summary["stages"], lines)
    return row if before is None else row | {"before": before["after"], **gain(before["after"], row["after"])}


def failure(done: Job, status: int, log: Path, seconds: float) -> Row:
    tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    # The results are committed: they say nothing about where this checkout lies.
    shown = [line.replace(str(ROOT), ".").replace(sys.prefix, "<python>") for line in tail]
    return identity(done, "failed", seconds) | {"exit_status": status, "log_tail": shown}


def identity(done: Job, status: str, seconds: float) -> Row:
    return {
        "algorithm": done.algorithm,
        "seed": done.seed,
        "status": status,
        "seconds": round(seconds, 1),
        "command": " ".join(done.command),
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": machine(),
    }


def figures(evaluation: Mapping[str, float]) -> dict[str, float]:
    return {name: evaluation[name] for name in ("pass@1", "pass@1_stderr", "greedy")}


def gain(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Of pass@1, its standard error, and the one over the other.

    The error is that of independent evaluations. Both are of the same prompts, so the true one is smaller if anything.
    """
    error = math.hypot(before["pass@1_stderr"], after["pass@1_stderr"])
    difference = after["pass@1"] - before["pass@1"]
    return {"gain": difference, "gain_stderr": error, "gain_in_stderr": difference / max(error, TINY)}


def costs(config: RunConfig, stages: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> Row:
    """Steps, tokens and what was clipped or masked, from the stage records and the lines of metrics.jsonl."""
    rl = [stage for stage in stages if isinstance(config.stages[stage["name"]], RlStage)]
    row: Row = {
        "rl_steps": sum(stage["steps"] for stage in rl),
        "optimiser_steps": sum(stage.get("steps", 0) * _updates(config, stage["name"]) for stage in stages),
        "rollout_tokens": round(sum(_rollout_tokens(stage, lines) for stage in stages)),
        "trained_tokens": sum(stage["trained_tokens"] for stage in stages),
    }
    for name, metric in (("clip_fraction", "policy/clip_fraction"), ("masked_fraction", "mismatch/masked_fraction")):
        values = [line[metric] for line in lines if metric in line]
        row |= {name: fmean(values)} if values else {}
    return row


def _updates(config: RunConfig, name: str) -> int:
    stage = config.stages[name]
    return stage.updates_per_step if isinstance(stage, RlStage) else 1 if hasattr(stage, "optimizer") else 0


def _rollout_tokens(stage: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> float:
    """Sampled completion tokens: an RL stage counts them itself, for others the metrics say number and mean length."""
    if "rl" in stage:
        return float(stage["rl"]["rollout_tokens"])
    found = (line for line in lines if line["stage"] == stage["name"] and "rollout/samples" in line)
    return sum(line["rollout/samples"] * line["rollout/completion_tokens"] for line in found)


def machine() -> str:
    """`AMD EPYC, 2 of 2 cores, Linux x86_64`: the processor, what this process may use of it, the system."""
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.processor() or "unknown CPU"
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    return f"{model}, {cores}, {platform.system()} {platform.machine()}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# --- results ----------------------------------------------------------------------------------------------------------


def load() -> Rows:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def store(key: str, row: Row) -> None:
    """The row is in the file, or, after a crash in between, the file is as it was."""
    rows = load() | {key: row}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    written = RESULTS.with_suffix(".partial")
    written.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n")
    written.replace(RESULTS)


def finished(row: Row | None) -> bool:
    return row is not None and row["status"] == "finished"


def brief(row: Row) -> str:
    if not finished(row):
        return f"failed with status {row['exit_status']} after {row['seconds']:.0f} s: {' '.join(row['log_tail'][-1:])}"
    rise = f", {row['gain']:+.3f} ({row['gain_in_stderr']:+.1f} standard errors)" if "gain" in row else ""
    return f"pass@1 {row['after']['pass@1']:.3f}{rise} in {row['seconds']:.0f} s"


@contextmanager
def only_one() -> Iterator[None]:
    """Nobody else runs this benchmark meanwhile: two would halve each other's speed and share folders."""
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    with (ROOT / RUNS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: the benchmark is running already. Follow it with: tail -f {RUNS}/benchmark.log")
        yield


# --- the table --------------------------------------------------------------------------------------------------------


def newest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Algorithm -> its finished rows, one a seed: of several configurations the last. The base is left out."""
    chosen: dict[tuple[str, int], Row] = {}
    for row in sorted(filter(finished, rows), key=lambda row: row["date"]):
        if row["algorithm"] != BASE:
            chosen[row["algorithm"], row["seed"]] = row
    out: dict[str, list[Row]] = {}
    for (name, _), row in sorted(chosen.items()):
        out.setdefault(name, []).append(row)
    return out


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error over seeds, None for a single one."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def pooled(rows: Sequence[Row]) -> float:
    """The mean gain in standard errors of that mean, from the evaluations' own errors."""
    error = math.sqrt(sum(row["gain_stderr"] ** 2 for row in rows)) / len(rows)
    return fmean(row["gain"] for row in rows) / max(error, TINY)


def verdict(rows: Sequence[Row]) -> str:
    """`improves` when every seed gains more than 2 standard errors, `worsens` when each loses as many."""
    gains = [row["gain_in_stderr"] for row in rows]
    if min(gains) > SIGNIFICANT:
        return "improves"
    return "worsens" if max(gains) < -SIGNIFICANT else "unclear"


def render(rows: Rows) -> str:
    """The Markdown page of all finished rows."""
    found = newest(rows.values())
    if not found:
        return "# What each algorithm gains\n\nNo run has finished yet: `make algorithms-table`.\n"
    shown = [row for group in found.values() for row in group]
    missing = sorted({f"`{row['algorithm']}` seed {row['seed']}" for row in rows.values() if not finished(row)})
    parts = [
        "# What each algorithm gains",
        "Made by `make algorithms-table`. Each run starts from the SFT base of its seed, which the tiny EXAONE 4.0 "
        "model is after the first stage of the quickstart, and is evaluated on the same held-out prompts as the base. "
        "pass@1 and greedy are means over seeds ± their standard error over seeds. The gain is given in pooled "
        "standard errors of the evaluations. *improves*: every seed gains more than 2 of its own standard errors.",
        f"Machine: {'; '.join(sorted({row['machine'] for row in shown}))}. "
        f"Dates: {min(row['date'] for row in shown)[:10]} to {max(row['date'] for row in shown)[:10]}. "
        f"Code: {', '.join(sorted({row['code'] for row in shown}))}.",
        _table(RESULT_COLUMNS, [_result(name, group) for name, group in found.items()]),
        *([REMARKS.read_text().strip()] if REMARKS.exists() else []),
        "## What it cost\n\nMeans over seeds. Runs differ in their number of optimiser steps and in what they sample, "
        "so this is no race: `OVERRIDES` in `benchmarks/algorithms_table.py` says what and why.",
        _table(COST_COLUMNS, [_cost(name, group) for name, group in found.items()]),
        "## Each seed",
        _table(SEED_COLUMNS, [_seed(row) for row in shown]),
        *([f"Failed, to be tried again by the next call: {', '.join(missing)}."] if missing else []),
    ]
    return "\n\n".join(parts) + "\n"


RESULT_COLUMNS = (
    "algorithm", "seeds", "pass@1 before", "pass@1 after", "greedy before", "greedy after", "gain",
    "in standard errors", "verdict",
)  # fmt: skip
COST_COLUMNS = (
    "algorithm", "RL steps", "optimiser steps", "rollout tokens", "trained tokens", "seconds", "completion tokens",
    "clipped", "masked",
)  # fmt: skip
SEED_COLUMNS = ("algorithm", "seed", "pass@1 before", "pass@1 after", "gain", "in standard errors", "command")


def _result(name: str, rows: Sequence[Row]) -> list[str]:
    measures = [(when, what) for what in ("pass@1", "greedy") for when in ("before", "after")]
    cells = [_spread([row[when][what] for row in rows]) for when, what in measures]
    change = _spread([row["gain"] for row in rows], sign="+")
    return [f"`{name}`", str(len(rows)), *cells, change, f"{pooled(rows):+.1f}", verdict(rows)]


def _cost(name: str, rows: Sequence[Row]) -> list[str]:
    whole = ("rl_steps", "optimiser_steps", "rollout_tokens", "trained_tokens", "seconds")
    cells = [f"{fmean(row[key] for row in rows):,.0f}" for key in whole]
    shares = [[row[key] for row in rows if key in row] for key in ("clip_fraction", "masked_fraction")]
    tokens = f"{fmean(row['completion_tokens'] for row in rows):.1f}"
    return [f"`{name}`", *cells, tokens, *(f"{fmean(values):.2%}" if values else "-" for values in shares)]


def _seed(row: Row) -> list[str]:
    measures = [f"{row[when]['pass@1']:.3f} ± {row[when]['pass@1_stderr']:.3f}" for when in ("before", "after")]
    change = [f"{row['gain']:+.3f}", f"{row['gain_in_stderr']:+.1f}"]
    return [f"`{row['algorithm']}`", str(row["seed"]), *measures, *change, f"`{row['command']}`"]


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


# --- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a run failed, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=benchmarked(), help="these algorithms alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--render", action="store_true", help="run nothing, write docs/algorithms_table.md")
    options = parser.parse_args(arguments)
    failed = 0
    try:
        if not options.render:
            with only_one():
                failed = run_all(options.only or benchmarked(), options.seeds)
    except KeyboardInterrupt:
        print("interrupted: the run in progress has ended; the next call starts it anew", file=sys.stderr)
        return 130
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(load()))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 1 if failed else 0


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell without job control starts background commands with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
