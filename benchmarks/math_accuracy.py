"""How often is the `math` reward wrong, and where?

    python -m benchmarks.math_accuracy [--data FOLDER] [--every 1] [--output FILE.json]

Two sets. `benchmarks/data/latex_pairs.jsonl` has answers labelled by hand, the wrong ones near misses. FOLDER may hold
`gsm8k_test.jsonl`: every worked solution as it is (right), with 1 added to its last line (wrong), and both again as a
short sentence. Prints the accuracy beside that of math-verify on the same texts, every false positive and every false
negative, and writes the same to FILE.json.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewards.processes import Call, Failure, ProcessPool, Verdict
from rewards.registry import RewardInput, Score

HERE = Path(__file__).parent
PAIRS = HERE / "data" / "latex_pairs.jsonl"
OUTPUT = HERE / "results" / "math_accuracy.json"
DEADLINE_S = 20.0
MEMORY_LIMIT_BYTES = 2 << 30
SHOWN = 40  # errors of one kind printed; the file has them all


@dataclass(frozen=True, slots=True)
class Pair:
    """A reference answer, the text of a completion, and whether that answers it."""

    topic: str
    gold: str
    answer: str
    correct: bool
    question: str = ""


def latex_pairs(path: Path = PAIRS) -> list[Pair]:
    """The labelled pairs of a file."""
    return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def gsm8k_pairs(folder: Path, every: int = 1) -> Iterator[Pair]:
    """Four pairs for each `every`-th problem: its solution and a sentence, as they are and shifted by one."""
    lines = (folder / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[::every]:
        row = json.loads(line)
        steps, gold = (part.strip() for part in row["answer"].split("####"))
        shifted = f"{int(gold.replace(',', '')) + 1:,}" if "," in gold else str(int(gold) + 1)
        for number, correct in ((gold, True), (shifted, False)):
            yield Pair("worked solution", gold, f"{steps}\n#### {number}", correct, row["question"])
            yield Pair("sentence", gold, f"So the answer is ${number}.", correct, row["question"])


# --- the two graders --------------------------------------------------------------------------------------------------


def ours(pairs: Sequence[Pair]) -> list[Verdict]:
    """The reward's verdicts, made as in a run: in a grader process with a deadline."""
    calls = [Call("math", _input(pair), {}, DEADLINE_S) for pair in pairs]
    pool = ProcessPool(1, MEMORY_LIMIT_BYTES)
    try:
        return pool.run(calls)
    finally:
        pool.close()


def math_verify_alone(pairs: Sequence[Pair]) -> list[bool]:
    """What math-verify says with its own extraction and time limits; the reference is boxed for it."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return [bool(verify(parse(rf"\boxed{{{pair.gold}}}"), parse(pair.answer))) for pair in pairs]


def _input(pair: Pair) -> RewardInput:
    return RewardInput.of(pair.answer, pair.gold, messages=({"role": "user", "content": pair.question},))


# --- the report -------------------------------------------------------------------------------------------------------


def report(pairs: Sequence[Pair], verdicts: Sequence[Verdict], alone: Sequence[bool]) -> dict[str, Any]:
    """Counts, accuracies and every error. A verdict that is no score (`failures`) counts as an error too."""
    judged = list(zip(pairs, verdicts, strict=True))
    false_positives = [_shown(p, v) for p, v in judged if isinstance(v, Score) and v.value == 1.0 and not p.correct]
    false_negatives = [_shown(p, v) for p, v in judged if isinstance(v, Score) and v.value == 0.0 and p.correct]
    failures = [_shown(pair, verdict) for pair, verdict in judged if not isinstance(verdict, Score)]
    errors = [*false_positives, *false_negatives, *failures]
    wrong_alone = [pair for pair, said in zip(pairs, alone, strict=True) if said != pair.correct]
    return {
        "pairs": len(pairs),
        "right_answers": sum(pair.correct for pair in pairs),
        "accuracy": 1 - len(errors) / len(pairs),
        "math_verify_alone": {
            "accuracy": 1 - len(wrong_alone) / len(pairs),
            "false_positives": sum(not pair.correct for pair in wrong_alone),
            "false_negatives": sum(pair.correct for pair in wrong_alone),
        },
        "pairs_by_topic": dict(Counter(pair.topic for pair in pairs)),
        "errors_by_topic": dict(Counter(error["topic"] for error in errors)),
        "false_positives": false_positives,
        "false_negatives": false_negatives,
        "failures": failures,
    }


def _shown(pair: Pair, verdict: Verdict) -> dict[str, Any]:
    said = verdict.message if isinstance(verdict, Failure) else verdict.reason
    return {key: value for key, value in asdict(pair).items() if key != "question"} | {"said": said}


def told(name: str, result: dict[str, Any]) -> str:
    """The report of one set as text."""
    alone = result["math_verify_alone"]
    counts = ", ".join(
        f"{len(result[kind])} {kind.replace('_', ' ')}" for kind in ("false_positives", "false_negatives", "failures")
    )
    lines = [
        f"{name}: {result['accuracy']:.2%} of {result['pairs']} right ({counts})",
        f"  math-verify alone: {alone['accuracy']:.2%} ({alone['false_positives']} false positives, "
        f"{alone['false_negatives']} false negatives)",
    ]
    for kind in ("false_positives", "false_negatives", "failures"):
        lines += [f"  {kind.replace('_', ' ')}:"] if result[kind] else []
        lines += [
            f"    [{error['topic']}] {error['gold']}  <-  {error['answer'][-90:]!r}  {error['said']}"
            for error in result[kind][:SHOWN]
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k_test.jsonl")
    parser.add_argument("--every", type=int, default=1, help="take each N-th problem of GSM8K")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the report goes as JSON")
    options = parser.parse_args()
    sets = {"latex_pairs": latex_pairs()}
    if options.data is not None:
        sets["gsm8k"] = list(gsm8k_pairs(options.data, options.every))
    results = {name: report(pairs, ours(pairs), math_verify_alone(pairs)) for name, pairs in sets.items()}
    for name, result in results.items():
        print(told(name, result))
    packages = {package: version(package) for package in ("math-verify", "latex2sympy2_extended", "sympy")}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"packages": packages, **results}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
