"""A benchmark of several parts: its command line, its results file and the table of its figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.isolated import REPOSITORY
from benchmarks.machine import facts

RESULTS = REPOSITORY / "benchmarks" / "results"
Part = Callable[..., dict[str, Any]]
"""Called with `quick` and `baseline`; returns `figures` and the details behind them."""


def run_parts(
    name: str, title: str, document: str | None, parts: Mapping[str, Part], arguments: Sequence[str] | None = None
) -> None:
    """Run the parts that the command line names, or all, and write `benchmarks/results/<name>.json` and `.md`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=document)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--quick", action="store_true", help="smaller sizes, minutes instead of hours")
    parser.add_argument("--baseline", metavar="GIT_REF", help="an older commit to time beside this checkout")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - parts.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such part. Choose from {', '.join(parts)}")
    with checkout(given.baseline) as baseline:
        for part in given.parts or parts:
            result = parts[part](quick=given.quick, baseline=baseline)
            record(given.output, part, result | {"quick": given.quick, "baseline": given.baseline})
            print(f"{part}: {json.dumps(result['figures'])}", flush=True)
    given.output.with_suffix(".md").write_text(table(title, json.loads(given.output.read_text())))


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
    for older in whole["parts"].get(name, {}).get("figure_names", ()):
        whole["figures"].pop(older, None)
    whole["figures"] |= result["figures"]
    details = {key: value for key, value in result.items() if key != "figures"}
    names = {"figure_names": sorted(result["figures"])}
    whole["parts"][name] = {**details, **names, "date": date.today().isoformat(), "machine": facts()}
    path.write_text(json.dumps(whole, indent=2) + "\n")


def table(title: str, whole: Mapping[str, Any]) -> str:
    """The figures and the machines they were measured on, in Markdown."""
    lines = [f"# {title}", "", "| figure | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in sorted(whole["figures"].items())]
    lines += ["", "| part | machine | date |", "| --- | --- | --- |"]
    for name, part in whole["parts"].items():
        machine = part["machine"]
        speeds = f"float32 {machine['float32_gflops']:g}, bfloat16 {machine['bfloat16_gflops']:g} GFLOP/s"
        short = " (quick)" if part["quick"] else ""
        processor = ", ".join(filter(None, [machine.get("gpu"), machine["cpu"]]))
        lines.append(f"| {name}{short} | {processor}, {machine['cores']} cores, {speeds} | {part['date']} |")
    return "\n".join(lines) + "\n"
