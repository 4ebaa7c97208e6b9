"""One attack or honest solution, run and checked: what it scored, what it did to the host, how the next job fared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attacks.catalogue import Program, Task, Text
from benchmarks.attacks.host import Host
from rewards.code import CodeResult, Limits, Options, Tier, grade, parse
from rewards.code.suites import CodeTest
from rewards.processes import Call, Failure, ProcessPool, Verdict
from rewards.registry import RewardInput, Score
from rlhf.errors import GroupwiseError

LIMITS = Limits(wall_s=4, test_s=1.5, memory_bytes=128 << 20, processes=16)
MARGIN_S = 10.0  # for starting and clearing away two sandboxes on a busy machine
HONEST = "def f(x): return [x * 1001, str(x)]"
BASELINE_RUNS = 15
SLOWEST_NEXT, NEXT_FLOOR_S, NEXT_TRIES = 3.0, 0.05, 3
GRADER = "grader"
"""The tier of texts: a killable grader process."""

_VALUES = [{"call": "f", "args": [n], "expected": [n * 1001, str(n)]} for n in (3, 5)]
_REFEREED = "for n in (3, 5):\n    assert f(n) == [n * 1001, str(n)]"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case. `faults` is empty when all is as it must be.

    `next_ms`: the next honest job, `next_ratio` that / the median. `earned_nothing`: an attack got what it should.
    """

    id: str
    family: str
    tier: str
    honest: bool
    paid: float
    verdict: str
    milliseconds: float
    next_ms: float
    next_ratio: float
    faults: tuple[str, ...]
    unharmed: bool
    earned_nothing: bool

    @property
    def holds(self) -> bool:
        return not self.faults


def task_tests(task: Task, secret: str) -> tuple[CodeTest, ...]:
    """What a program is asked: to compute, to name the host's secret, to print, or to satisfy a referee."""
    records = {
        "values": _VALUES,
        "secret": [{"call": "f", "args": [n], "expected": secret} for n in (3, 5)],
        "stdin": [{"stdin": f"{n}\n", "stdout": f"{n * 1001}\n"} for n in (3, 5)],
        "referee": [{"assert": _REFEREED}],
    }
    return parse({"tests": records[task]})


class ProgramRunner:
    """Runs programs under one tier, after the median time of an honest job was measured."""

    def __init__(self, tier: Tier, host: Host) -> None:
        self.tier, self._host = tier, host
        self.baseline_s = statistics.median(self._honest_job() for _ in range(BASELINE_RUNS))

    def run(self, program: Program) -> Result:
        """The checked outcome of `program`; nothing of it is left, or a fault says so."""
        tests = task_tests(program.task, self._host.secret)
        source = self._host.filled_in(program.source)
        descriptors, started = _descriptors(), time.monotonic()
        outcome = _graded(source, tests, self.tier)
        elapsed_s = time.monotonic() - started
        harm = self._host.harm()
        if (now := _descriptors()) != descriptors:
            harm.append(f"the grader holds {now} descriptors, {descriptors} before")
        ratio = _next_ratio(self._honest_job, self.baseline_s)
        paid = outcome.passed_fraction if isinstance(outcome, CodeResult) else 0.0
        passed = isinstance(outcome, CodeResult) and outcome.passed
        verdict = outcome.summary() if isinstance(outcome, CodeResult) else outcome
        faults = [*_score_faults(program, passed, paid), *harm, *_leaks(verdict, self._host.secret)]
        faults += (
            [] if verdict.isprintable() else ["control characters in its reason, which goes to logs and terminals"]
        )
        faults += _slow_faults(ratio, self.baseline_s)
        faults += [] if isinstance(outcome, CodeResult) else ["it ended in an error"]
        faults += [f"it took {elapsed_s:.1f} s"] if elapsed_s > LIMITS.wall_s + MARGIN_S else []
        earned = bool(_score_faults(program, passed, paid))
        return Result(
            program.id, program.family, self.tier.value, program.honest, paid, verdict, elapsed_s * 1000,
            ratio * self.baseline_s * 1000, ratio,
            tuple(faults), not harm, not earned,
        )  # fmt: skip

    def _honest_job(self) -> float:
        started = time.monotonic()
        result = grade(HONEST, task_tests("values", ""), LIMITS, tier=self.tier)
        if not result.passed:
            raise GroupwiseError(
                f"the honest job fails under {self.tier.value}: {result.summary()}. Nothing is proven."
            )
        return time.monotonic() - started


class TextRunner:
    """Runs texts in a pool of one grader process."""

    def __init__(self, pool: ProcessPool, host: Host) -> None:
        self._pool, self._host = pool, host
        self.baseline_s = statistics.median(self._honest_job() for _ in range(BASELINE_RUNS))

    def run(self, text: Text) -> Result:
        """The checked outcome of `text`."""
        sample = text.sample(self._host.filled_in(text.completion))
        answer = self._pool.answers([Call(text.reward, sample, text.params, text.deadline_s)])[0]
        harm = self._host.harm(self._pool.pids())
        ratio = _next_ratio(self._honest_job, self.baseline_s)
        given = answer.verdicts[0]
        paid = given.value if isinstance(given, Score) else 0.0
        faults = [*_verdict_faults(text, given), *harm, *_leaks(_in_words(given), self._host.secret)]
        faults += _slow_faults(ratio, self.baseline_s)
        earned = bool(_verdict_faults(text, given))
        return Result(
            text.id, text.family, GRADER, text.honest, paid, _in_words(given), answer.seconds * 1000,
            ratio * self.baseline_s * 1000, ratio,
            tuple(faults), not harm, not earned,
        )  # fmt: skip

    def _honest_job(self) -> float:
        call = Call("math", RewardInput.of(r"\boxed{18}", "18"), {}, 60.0)
        answer = self._pool.answers([call])[0]
        if _in_words(answer.verdicts[0]).split()[0] != "1":
            raise GroupwiseError(f"the honest text fails: {answer.verdicts[0]}. Nothing is proven.")
        return answer.seconds


def _graded(source: str, tests: tuple[CodeTest, ...], tier: Tier) -> CodeResult | str:
    """The result, or the error that the grader raised: no program may make it do that."""
    try:
        return grade(source, tests, LIMITS, Options(stop_at_first=False), tier)
    except (GroupwiseError, OSError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


def _score_faults(case: Program, passed: bool, paid: float) -> list[str]:
    if case.honest:
        return [] if passed else ["an honest solution fails"]
    if passed:
        return ["it passes"]
    return [f"{paid:.0%} of its answers pass"] if paid > 0 and not case.partial else []


def _verdict_faults(text: Text, given: Verdict) -> list[str]:
    if isinstance(given, Failure):
        return [] if "error" in text.expected and not text.honest else [f"an error: {given.kind}"]
    value = given.value if isinstance(given, Score) else 0.0
    if text.honest:
        return [] if value >= text.at_least else [f"honest, and gets {value:g}"]
    if text.expected == "error":
        return ["no error"]
    return [f"it gets {value:g}"] if value > text.at_most else []


def _leaks(verdict: str, secret: str) -> list[str]:
    return ["the secret is in its reason"] if secret in verdict else []


def _slow_faults(ratio: float, baseline_s: float) -> list[str]:
    late = ratio * baseline_s > allowed_next_s(baseline_s)
    return [f"the next job takes {ratio:.1f} times as long"] if late else []


def _next_ratio(honest_job: Callable[[], float], baseline_s: float) -> float:
    """The next honest job's time / the median. Where it is too slow the best of some: a hiccup is not the attack's."""
    seconds = honest_job()
    for _ in range(NEXT_TRIES - 1):
        if seconds <= allowed_next_s(baseline_s):
            break
        seconds = min(seconds, honest_job())
    return seconds / baseline_s


def allowed_next_s(baseline_s: float) -> float:
    """How long the job after an attack may take: three times the median, but never less than 50 ms."""
    return max(SLOWEST_NEXT * baseline_s, NEXT_FLOOR_S)


def _in_words(given: Verdict) -> str:
    match given:
        case Score():
            return f"{given.value:g} {given.reason}"
        case Failure():
            return f"error ({given.kind}): {given.message}"
    return f"abstains: {given.reason}"


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
