"""Does an attack on the rewards get anything, or harm the machine?

    make attacks                                    everything, on every tier that holds here
    make attacks ARGS="--tier strong --family daemons"
    python -m benchmarks.attacks --list

Every program runs under every tier, every text in a grader process; after each the host is looked at and an honest job
is timed. Prints a line per family and tier and every failure with its reason. The exit status is 1 where one failed.
"nothing": attacks that got what they should; "next ms": the slowest honest job after one.
benchmarks/results/attacks.json is written by a run of everything, `--json FILE` by any.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.attacks import catalogue
from benchmarks.attacks.catalogue import Case, Program, Text
from benchmarks.attacks.host import Host
from benchmarks.attacks.run import GRADER, ProgramRunner, Result, TextRunner, allowed_next_s
from rewards.code import Tier
from rewards.code.tiers import ORDER, probe
from rewards.processes import ProcessPool

RESULTS = Path(__file__).parents[1] / "results" / "attacks.json"
GRADER_MEMORY_BYTES = 2 << 30
HEADER = ("family", "tier", "attacks", "nothing", "unharmed", "honest", "passed", "median ms", "next ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    options = _parser().parse_args(arguments)
    chosen = [case for case in catalogue.everything() if options.family in (None, case.family)]
    if options.list:
        print(*(f"{case.family:28}{case.id:34}{case.tries}" for case in chosen), sep="\n")
        return 0
    tiers, missing = _tiers(options.tier)
    for tier, why in missing.items():
        print(f"tier {tier.value} does not hold here and is left out: {why}")
    results, baselines = run_all(chosen, tiers)
    print(*table(results), "", *failures(results), sep="\n")
    for name, seconds in baselines.items():
        times = f"{seconds * 1000:.1f} ms (median), and after an attack at most {allowed_next_s(seconds) * 1000:.0f} ms"
        print(f"{name}: an honest job takes {times}")
    everything = options.family is None and options.tier == "all"
    if path := options.json or (RESULTS if everything else None):
        write(path, results, baselines, {tier.value: why for tier, why in missing.items()})
    asked_for = options.tier != "all" and bool(missing)
    return int(asked_for or not results or not all(result.holds for result in results))


def run_all(cases: Sequence[Case], tiers: Sequence[Tier]) -> tuple[list[Result], dict[str, float]]:
    """A result per program and tier and per text, and the median seconds of the honest job of each tier."""
    results: list[Result] = []
    baselines: dict[str, float] = {}
    with Host() as host:
        for tier in tiers:
            if found := [case for case in cases if isinstance(case, Program) and _applies(case, tier)]:
                runner = ProgramRunner(tier, host)
                baselines[tier.value] = runner.baseline_s
                results += _shown(map(runner.run, found), len(found))
        if texts := [case for case in cases if isinstance(case, Text)]:
            with closing(ProcessPool(1, GRADER_MEMORY_BYTES, ("benchmarks.attacks.gate_reward",))) as pool:
                grader = TextRunner(pool, host)
                baselines[GRADER] = grader.baseline_s
                results += _shown(map(grader.run, texts), len(texts))
    return results, baselines


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the table: a row per family and tier, then one per tier."""
    rows = [_row(family, tier, _of(results, family, tier)) for family, tier in _groups(results)]
    rows += [_row("all", tier, _of(results, None, tier)) for tier in dict.fromkeys(r.tier for r in results)]
    widths = [max(len(str(row[column])) for row in (HEADER, *rows)) for column in range(len(HEADER))]
    for row in (HEADER, *rows):
        cells = (
            f"{cell:<{w}}" if n < 2 else f"{cell:>{w}}" for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def failures(results: Iterable[Result]) -> Iterator[str]:
    """A line per case that is not as it must be."""
    for result in results:
        if not result.holds:
            yield f"FAILED {result.tier} {result.id}: {'; '.join(result.faults)} ({result.verdict[:200]})"


def write(path: Path, results: Sequence[Result], baselines: dict[str, float], left_out: dict[str, str]) -> None:
    """The results as JSON: the table's rows and every single one."""
    groups = [dict(zip(HEADER, _row(f, t, _of(results, f, t)), strict=True)) for f, t in _groups(results)]
    document = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "honest_job_median_ms": {tier: seconds * 1000 for tier, seconds in baselines.items()},
        "tiers_left_out": left_out,
        "failed": sum(not result.holds for result in results),
        "families": groups,
        "cases": [asdict(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _row(family: str, tier: str, results: Sequence[Result]) -> tuple[Any, ...]:
    attacks, honest = ([r for r in results if r.honest is kind] for kind in (False, True))
    median_ms = statistics.median(result.milliseconds for result in attacks or results)
    slowest_ms = max(result.next_ms for result in results)
    nothing = sum(result.earned_nothing for result in attacks)
    passed = sum(result.holds for result in honest)
    unharmed = sum(result.unharmed for result in results)
    harmed = f"{unharmed}/{len(results)}"
    return family, tier, len(attacks), nothing, harmed, len(honest), passed, f"{median_ms:.0f}", f"{slowest_ms:.0f}"


def _of(results: Iterable[Result], family: str | None, tier: str) -> list[Result]:
    return [result for result in results if family in (None, result.family) and result.tier == tier]


def _groups(results: Iterable[Result]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((result.family, result.tier) for result in sorted(results, key=_position)))


def _position(result: Result) -> tuple[int, int]:
    tiers = [tier.value for tier in ORDER]
    return catalogue.families().index(result.family), tiers.index(result.tier) if result.tier in tiers else len(tiers)


def _tiers(name: str) -> tuple[list[Tier], dict[Tier, str]]:
    """(the tiers that hold here, those asked for that do not with why)."""
    asked = ORDER if name == "all" else (Tier(name),)
    problems = {tier: probe(tier) for tier in asked}
    return [t for t, why in problems.items() if why is None], {t: why for t, why in problems.items() if why is not None}


def _applies(program: Program, tier: Tier) -> bool:
    return not program.honest or tier.value in program.tiers


def _shown(results: Iterable[Result], count: int) -> Iterator[Result]:
    """The results as they come, with a line on where they are when someone watches."""
    for number, result in enumerate(results, 1):
        if sys.stderr.isatty():
            print(f"\r{result.tier} {number}/{count} {result.id:40.40}", end="", file=sys.stderr, flush=True)
        yield result
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=["all", *(tier.value for tier in ORDER)], default="all")
    parser.add_argument("--family", choices=catalogue.families(), metavar="NAME", help="one family, as --list names it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--list", action="store_true", help="name the attacks and run none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
