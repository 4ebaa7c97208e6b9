"""What do the reward services cost, beside doing the same with nothing round it?

    python -m benchmarks.rewards_throughput [--repetitions 9] [--largest 10000] [--no-ray] [--output FILE.json]

    code        sandboxed gradings per second, beside bare starts of `bwrap` with an interpreter that does nothing
    math        verifications per second through grader processes, beside math-verify in a loop in this process
    queue       seconds per sample when 10, 100, ... samples wait, through a `Scorer` and as `rewards score` does it
    heartbeat   the longest time in which an asyncio driver's loop did not come round while it has samples scored

Both sides of a ratio run in turn, many times, and the median of the ratios counts: a busy machine slows both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.math_accuracy import Pair, latex_pairs
from rewards.cli.rows import Row, read_rows, text_group
from rewards.cli.service import RowService
from rewards.code import Tier, grade, parse, self_test
from rewards.code.launch import bubblewrap, interpreter
from rewards.processes import Call, ProcessPool
from rewards.registry import RewardInput
from rewards.scorer import Scorer
from rlhf.config import RewardsConfig
from rlhf.samples import Scores, TextGroup

OUTPUT = Path(__file__).parent / "results" / "rewards_throughput.json"
MEMORY_LIMIT_BYTES = 2 << 30
GROUP_SIZE = 10
HEARTBEAT_S = 0.002
IN_FLIGHT = 16  # groups that a driver has scored at a time
MAX_BLOCKED_S = 0.05
SOLUTION = "def double(n):\n    return 2 * n\n"
TESTS = {"tests": [{"call": "double", "args": [21], "expected": 42}]}

Work = Callable[[], Any]


def seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def side_by_side(ours: Work, bare: Work, repetitions: int, count: int) -> dict[str, float]:
    """Both in turn; each does `count` things. `ratio`: how much longer ours takes, the median over the turns."""
    ours(), bare()  # warm
    turns = [(seconds(ours), seconds(bare)) for _ in range(repetitions)]
    ratios = sorted(mine / theirs for mine, theirs in turns)
    return {
        "ours_per_s": count / statistics.median(mine for mine, _ in turns),
        "bare_per_s": count / statistics.median(theirs for _, theirs in turns),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


# --- code -------------------------------------------------------------------------------------------------------------


def code_cost(repetitions: int, runs: int = 10) -> dict[str, Any]:
    """`grade` of a solution with one test, beside `bwrap` round an interpreter that ends at once."""
    path, tier = bubblewrap(), self_test()
    if path is None or tier is not Tier.STRONG:
        return {"skipped": f"needs bubblewrap and the tier strong; here the tier is {tier.value}"}
    bare = [
        path,
        "--ro-bind",
        "/",
        "/",
        "--unshare-all",
        "--die-with-parent",
        interpreter(tier),
        "-I",
        "-S",
        "-c",
        "pass",
    ]
    tests = parse(TESTS)

    def graded() -> None:
        for _ in range(runs):
            assert grade(SOLUTION, tests).passed

    def started() -> None:
        for _ in range(runs):
            subprocess.run(bare, check=True)

    return {"tier": tier.value, **side_by_side(graded, started, repetitions, runs)}


# --- math -------------------------------------------------------------------------------------------------------------


def math_cost(repetitions: int, processes: int) -> dict[str, Any]:
    """The `math` reward in grader processes, beside math-verify here. Only answers that both have to parse."""
    pairs = [pair for pair in latex_pairs() if pair.topic in ("polynomials", "radicals", "pi", "complex", "tuples")]
    calls = [Call("math", RewardInput.of(pair.answer, pair.gold), {}, 30.0) for pair in pairs]
    pool = ProcessPool(processes, MEMORY_LIMIT_BYTES)
    try:
        cost = side_by_side(lambda: pool.run(calls), lambda: verified(pairs), repetitions, len(pairs))
    finally:
        pool.close()
    return {"processes": processes, **cost}


def verified(pairs: Sequence[Pair]) -> list[bool]:
    """math-verify in a loop, with its own time limits."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    latex = [LatexExtractionConfig()]
    return [bool(verify(parse(rf"\boxed{{{pair.gold}}}", latex), parse(pair.answer, latex))) for pair in pairs]


# --- queue ------------------------------------------------------------------------------------------------------------


def queue_cost(largest: int, repetitions: int) -> dict[str, Any]:
    """Seconds per sample by the number that wait; `flatness`: the dearest over the cheapest."""
    counts = [10**power for power in range(1, 10) if 10**power <= largest]
    with tempfile.TemporaryDirectory() as folder, RowService(config()) as service:
        service.scorer.score(group(0, GROUP_SIZE))  # warm
        files = {count: _rows_file(Path(folder), count) for count in counts}
        ways: dict[str, Callable[[int], Any]] = {
            "scorer": lambda count: service.scorer.score(group(count, count)),
            "command": lambda count: _score_file(service, files[count]),
        }
        costs = {way: {n: _per_sample(work, n, repetitions) for n in counts} for way, work in ways.items()}
    return {f"{way}_s_per_sample": cost for way, cost in costs.items()} | {
        f"{way}_flatness": max(cost.values()) / min(cost.values()) for way, cost in costs.items()
    }


def _per_sample(work: Callable[[int], Any], count: int, repetitions: int) -> float:
    times = max(3, min(30, repetitions * 1000 // count))
    return statistics.median(seconds(partial(work, count)) for _ in range(times)) / count


def _rows_file(folder: Path, count: int) -> Path:
    path = folder / f"rows-{count}.jsonl"
    rows = ({"prompt": "?", "completion": f"so it is {n}", "answer": str(n)} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _score_file(service: RowService, path: Path) -> None:
    """What `python -m rewards score` does once its processes have started."""
    assert all(result.outcome["value"] == 1.0 for result in service.results("math", read_rows(path)))


def config(processes: int = 1) -> RewardsConfig:
    components = {"math": {"cache": False, "deadline_s": 30.0}}
    return RewardsConfig.model_validate({"components": components, "processes": processes})


def group(number: int, size: int, gold: str = "42") -> TextGroup:
    """`size` samples of one prompt, half of them right; their texts differ."""
    rows = [
        Row(
            f"{number}-{n}",
            ({"role": "user", "content": "?"},),
            f"{n} times it is \\boxed{{{gold if n % 2 else n}}}",
            gold,
            {},
        )
        for n in range(size)
    ]
    return text_group(rows, "math")


# --- heartbeat --------------------------------------------------------------------------------------------------------


async def longest_gap(score: Callable[[TextGroup], Awaitable[Any]], groups: Sequence[TextGroup]) -> float:
    """The longest time (s) between two turns of the loop beyond the pause asked for, while all groups are scored."""
    gaps, stop, places = [0.0], asyncio.Event(), asyncio.Semaphore(IN_FLIGHT)
    await score(groups[0])  # the first call makes connections

    async def beat() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            await asyncio.sleep(HEARTBEAT_S)
            now = time.perf_counter()
            gaps.append(now - last - HEARTBEAT_S)
            last = now

    async def in_turn(one: TextGroup) -> None:
        async with places:
            await score(one)

    heart = asyncio.create_task(beat())
    await asyncio.gather(*(in_turn(one) for one in groups[1:]))
    stop.set()
    await heart
    return max(gaps)


async def idle_gap(duration_s: float = 2.0) -> float:
    """The same where nothing is scored: what the machine itself does to a loop."""

    return await longest_gap(lambda _: asyncio.sleep(duration_s), [group(0, 1)] * 2)


def heartbeat(with_ray: bool) -> dict[str, Any]:
    """The longest gaps with a pool behind threads and with a Ray actor."""
    groups = [group(number, GROUP_SIZE, gold="x^2+1") for number in range(60)]
    result: dict[str, Any] = {"limit_s": MAX_BLOCKED_S, "idle_s": asyncio.run(idle_gap())}
    scorer = Scorer(config())
    try:
        result["pool_s"] = asyncio.run(longest_gap(lambda one: asyncio.to_thread(scorer.score, one), groups))
    finally:
        scorer.close()
    if with_ray:
        result["ray_s"] = _ray_gap(groups)
    return result


def _ray_gap(groups: Sequence[TextGroup]) -> float:
    import ray

    from rewards.worker import spawn

    ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
    try:
        (worker,) = spawn(config(), 1, {"num_cpus": 0})
        ray.get(worker.ping.remote(), timeout=120)

        async def score(one: TextGroup) -> Scores:
            scored: Scores = await worker.score.remote(one)
            return scored

        return asyncio.run(longest_gap(score, groups))
    finally:
        ray.shutdown()


# --- the report -------------------------------------------------------------------------------------------------------


def told(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{'':26}{'ours/s':>10}{'bare/s':>10}{'ratio':>8}   (lowest to highest)"]
    for name in ("code", "math", "math_parallel"):
        cost = result[name]
        if "skipped" in cost:
            lines.append(f"{name:26}{cost['skipped']}")
            continue
        spread = f"({cost['ratio_low']:.2f} to {cost['ratio_high']:.2f})"
        lines.append(f"{name:26}{cost['ours_per_s']:10.1f}{cost['bare_per_s']:10.1f}{cost['ratio']:8.2f}   {spread}")
    queue, beat = result["queue"], result["heartbeat"]
    for way in ("scorer", "command"):
        costs = ", ".join(f"{n}: {1e3 * cost:.3f}" for n, cost in queue[f"{way}_s_per_sample"].items())
        lines.append(f"{way + ', ms per sample':26}{costs}; dearest over cheapest {queue[f'{way}_flatness']:.2f}")
    gaps = ", ".join(f"{name.removesuffix('_s')} {1e3 * gap:.1f}" for name, gap in beat.items() if name != "limit_s")
    lines.append(f"{'longest gap, ms':26}{gaps} (limit {1e3 * beat['limit_s']:.0f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9, help="turns of each side of a ratio")
    parser.add_argument("--largest", type=int, default=10_000, help="samples in the longest queue")
    parser.add_argument("--no-ray", action="store_true", help="leave out the heartbeat beside a Ray actor")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the figures go as JSON")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    result = {
        "cores": cores,
        "load_before": os.getloadavg()[0],
        "code": code_cost(options.repetitions),
        "math": math_cost(options.repetitions, 1),
        "math_parallel": math_cost(options.repetitions, cores),
        "queue": queue_cost(options.largest, options.repetitions),
        "heartbeat": heartbeat(not options.no_ray),
    }
    print(told(result))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
