"""What does the learner cost in memory and time?

    python -m benchmarks.learner [PART ...] [--quick] [--baseline GIT_REF] [--output FILE.json]

    logprob_memory   peak memory of log-probs and their backward pass by vocabulary and tokens
    packing          padding, balance over ranks, time per trained token on long-tailed lengths
    learner          trained tokens per second beside a bare PyTorch loop and an older checkout
    zero3_load       peak memory of a rank after loading and one step, by model size and ranks
    full_size        the EXAONE-4.0-1.2B architecture, one sequence of 8,192 tokens

All parts run unless some are named; figures of parts that did not run are kept from the last results. `--baseline`
checks GIT_REF out beside this tree and times it on the same work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.learner import full_size, logprob_memory, packing, speed, zero3_load
from benchmarks.learner.isolated import REPOSITORY
from benchmarks.learner.machine import facts

RESULTS = REPOSITORY / "benchmarks" / "results"
PARTS = {
    "logprob_memory": logprob_memory.run,
    "packing": packing.run,
    "learner": speed.run,
    "zero3_load": zero3_load.run,
    "full_size": full_size.run,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="smaller sizes, minutes instead of hours")
    parser.add_argument("--baseline", metavar="GIT_REF", help="an older commit to time beside this checkout")
    parser.add_argument("--output", type=Path, default=RESULTS / "learner.json")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - PARTS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such part. Choose from {', '.join(PARTS)}")
    with checkout(given.baseline) as baseline:
        for name in given.parts or PARTS:
            result = PARTS[name](quick=given.quick, baseline=baseline)
            record(given.output, name, result | {"quick": given.quick, "baseline": given.baseline})
            print(f"{name}: {json.dumps(result['figures'])}", flush=True)
    given.output.with_suffix(".md").write_text(table(json.loads(given.output.read_text())))


@contextmanager
def checkout(ref: str | None) -> Iterator[Path | None]:
    """A work tree of `ref` while the block runs; None without one."""
    if ref is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "baseline"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--detach", str(path), ref], check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True)


def record(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Put one part's result into the file, beside those of other parts."""
    whole: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"figures": {}, "parts": {}}
    whole["figures"] |= result["figures"]
    details = {key: value for key, value in result.items() if key != "figures"}
    whole["parts"][name] = {**details, "date": date.today().isoformat(), "machine": facts()}
    path.write_text(json.dumps(whole, indent=2) + "\n")


def table(whole: Mapping[str, Any]) -> str:
    """The figures and the machines they were measured on, in Markdown."""
    lines = ["# The learner, measured", "", "| figure | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in sorted(whole["figures"].items())]
    lines += ["", "| part | machine | date |", "| --- | --- | --- |"]
    for name, part in whole["parts"].items():
        machine = part["machine"]
        speeds = f"float32 {machine['float32_gflops']:g}, bfloat16 {machine['bfloat16_gflops']:g} GFLOP/s"
        short = " (quick)" if part["quick"] else ""
        lines.append(f"| {name}{short} | {machine['cpu']}, {machine['cores']} cores, {speeds} | {part['date']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
