"""Do the reference solutions of HumanEval and MBPP pass the `code` reward, and do broken ones fail?

    python -m benchmarks.code_gold --data FOLDER [--every 10] [--tier strong]

FOLDER holds `humaneval.jsonl.gz` and/or `mbpp.jsonl`. Every reference solution is graded as it is (it should pass) and
with one change to its syntax tree (it should fail, unless the change makes no difference to these tests). Prints the
shares, how many tests were rewritten to questions and how many need a referee, and every reference that fails with why.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.code import Limits, Options, Tier, grade, parse
from rewards.code.suites import CallTest
from rlhf.errors import DataError

LIMITS = Limits(wall_s=20, test_s=15)


@dataclass
class Tally:
    """What became of one data set."""

    golds: int = 0
    passed: int = 0
    mutants: int = 0
    mutants_passed: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    elapsed_s: list[float] = field(default_factory=list)


def humaneval(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, reference solution, metadata) per problem."""
    path = folder / "humaneval.jsonl.gz"
    for line in gzip.decompress(path.read_bytes()).splitlines() if path.exists() else ():
        row = json.loads(line)
        setup = helpers(row["prompt"], row["entry_point"])
        metadata = {"entry_point": row["entry_point"], "setup": setup, "tests": [{"assert": row["test"]}]}
        yield row["task_id"], row["prompt"] + row["canonical_solution"], metadata


def helpers(prompt: str, entry_point: str) -> str:
    """What a prompt defines beside the function to be written: some tests use it."""
    tree = ast.parse(prompt + "    pass\n")
    tree.body = [node for node in tree.body if getattr(node, "name", None) != entry_point]
    return ast.unparse(tree)


def mbpp(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, reference solution, metadata) per problem."""
    path = folder / "mbpp.jsonl"
    for line in path.open() if path.exists() else ():
        row = json.loads(line)
        tests = [{"assert": source} for source in row["test_list"]]
        yield f"MBPP/{row['task_id']}", row["code"], {"setup": row["test_setup_code"], "tests": tests}


class Mutation(ast.NodeTransformer):
    """Makes every return value of the outermost functions another one."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        value = node.value or ast.Constant(None)
        return ast.Return(ast.Tuple([value, ast.Constant("changed")], ast.Load()))

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        return node


def mutated(source: str) -> str:
    """`source` with every function returning a pair of what it returned and a word."""
    return ast.unparse(ast.fix_missing_locations(Mutation().visit(ast.parse(source))))


def measure(problems: Iterator[tuple[str, str, dict[str, Any]]], every: int, tier: Tier | None) -> Tally:
    """The tally over each `every`-th problem."""
    tally = Tally()
    for position, (name, source, metadata) in enumerate(problems):
        if position % every == 0:
            tally.golds += 1
            try:
                _one(tally, name, source, metadata, tier)
            except DataError as error:
                tally.failures.append(f"{name}: {error}")
    return tally


def _one(tally: Tally, name: str, source: str, metadata: dict[str, Any], tier: Tier | None) -> None:
    tests = parse(metadata)
    tally.forms.update("question" if isinstance(test, CallTest) else "referee" for test in tests)
    result = grade(source, tests, LIMITS, Options(), tier)
    tally.elapsed_s.append(result.elapsed_s)
    tally.passed += result.passed
    if not result.passed:
        tally.failures.append(f"{name}: {result.summary()}")
    tally.mutants += 1
    if grade(mutated(source), tests, LIMITS, Options(), tier).passed:
        tally.mutants_passed += 1
        tally.failures.append(f"{name}: its mutation passes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with humaneval.jsonl.gz and mbpp.jsonl")
    parser.add_argument("--every", type=int, default=1, help="grade each N-th problem")
    parser.add_argument("--tier", type=Tier, default=None, help="default: the strongest that holds")
    options = parser.parse_args()
    for name, problems in (("HumanEval", humaneval(options.data)), ("MBPP", mbpp(options.data))):
        tally = measure(problems, options.every, options.tier)
        if tally.golds:
            median_ms = 1000 * statistics.median(tally.elapsed_s or [0.0])
            print(f"{name}: {tally.passed}/{tally.golds} references pass")
            print(f"  {tally.mutants_passed}/{tally.mutants} mutations pass")
            print(f"  tests: {dict(tally.forms)}; median {median_ms:.0f} ms a solution")
            print("\n".join(f"  {failure}" for failure in tally.failures))


if __name__ == "__main__":
    main()
