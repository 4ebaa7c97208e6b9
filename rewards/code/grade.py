"""Run a solution against its tests: the trusted side, which alone knows what is expected.

Everything in the candidate's sandbox is taken to be the candidate, the harness included. It is asked one question at a
time, under a nonce it cannot know before, and gets no second chance: an answer that comes early, twice, late, too long
or out of shape fails. Exit codes and what it prints mean nothing. So the only way to pass is to answer each input with
the value that is expected, and that value has never been where the candidate is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from rewards.code import compare
from rewards.code.inside.wire import Wire, WireError, check
from rewards.code.launch import Limits, Tier
from rewards.code.sandbox import Breach, Sandbox
from rewards.code.suites import CallTest, CodeTest, ProgramTest, RefereeTest
from rewards.code.tiers import self_test
from rewards.registry import printable
from rlhf.errors import ConfigError, DataError

OutcomeKind = Literal["passed", "wrong", "raised", "timeout", "memory", "ended", "protocol", "output", "not run"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one test ended, with a short text on why."""

    kind: OutcomeKind
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.kind == "passed"


@dataclass(frozen=True, slots=True)
class CodeResult:
    """One outcome per test, in their order, and the tier they ran under."""

    outcomes: tuple[Outcome, ...]
    tier: Tier
    elapsed_s: float

    @property
    def passed(self) -> bool:
        """Every test passed, and there was one."""
        return bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)

    @property
    def passed_fraction(self) -> float:
        return sum(outcome.passed for outcome in self.outcomes) / max(1, len(self.outcomes))

    def summary(self) -> str:
        """The tier, the counts, and the first failure."""
        counts = Counter(outcome.kind for outcome in self.outcomes)
        text = f"{self.tier.value}: {counts['passed']}/{len(self.outcomes)} tests passed"
        failed = next((o for o in self.outcomes if not o.passed), None)
        return text if failed is None else f"{text}; first failure: {failed.kind} {failed.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class Options:
    """How to grade.

    `stop_at_first`: leave the tests after the first failure "not run". `command`: how a program of another language is
    run, as [suffix of its file, argument, ...], with {source} for the file's name. The rest is for `compare.equal`.
    """

    tolerance: float = 1e-9
    strict_sequences: bool = False
    stop_at_first: bool = True
    command: tuple[str, ...] = ()


def grade(
    source: str,
    tests: Sequence[CodeTest],
    limits: Limits | None = None,
    options: Options | None = None,
    tier: Tier | None = None,
) -> CodeResult:
    """The outcome of every test of `source`. Nothing of it is left when this returns.

    `tier` defaults to the strongest one that `self_test` proves. Raises ConfigError when there is none, DataError when
    a test itself is broken, WorkerLostError when a sandbox cannot be ended: no fault of the solution, so no outcome.
    """
    options = options or Options()
    tier = tier or self_test()
    if options.command and tier is Tier.LANDLOCK:
        rule = "needs the tier strong or userns. landlock has no place for its file. Allow user namespaces"
        raise ConfigError([f"command = {list(options.command)}: {rule}."])
    started = time.monotonic()
    with _Grader(source, limits or Limits(), options, tier) as grader:
        outcomes = grader.run(tests)
    return CodeResult(outcomes, tier, time.monotonic() - started)


class _Grader:
    """Grades one solution; holds at most one sandbox with it, replaced when a test has broken it."""

    def __init__(self, source: str, limits: Limits, options: Options, tier: Tier) -> None:
        self._source, self._limits, self._options, self._tier = source, limits, options, tier
        self._deadline = time.monotonic() + limits.wall_s
        self._stack = ExitStack()
        self._sandbox: Sandbox | None = None
        self._setup = ""

    def __enter__(self) -> _Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def run(self, tests: Sequence[CodeTest]) -> tuple[Outcome, ...]:
        outcomes: list[Outcome] = []
        for position, test in enumerate(tests):
            if outcomes and self._options.stop_at_first and not outcomes[-1].passed:
                break
            outcomes.append(self._run_one(test, last=position == len(tests) - 1))
        return (*outcomes, *[Outcome("not run")] * (len(tests) - len(outcomes)))

    def _run_one(self, test: CodeTest, last: bool) -> Outcome:
        if "\0" in self._source or not _encodable(self._source):
            return Outcome("raised", "its text is not a program")
        try:
            match test:
                case ProgramTest():
                    return self._program(test)
                case CallTest():
                    outcome = self._call(test)
                case RefereeTest():
                    outcome = self._referee(test)
            if last and self._sandbox is not None:
                self._sandbox.farewell()
        except Breach as breach:
            self._drop()
            return Outcome(breach.kind, str(breach))  # type: ignore[arg-type]
        return outcome

    # --- the three kinds of test --------------------------------------------------------------------------------------

    def _call(self, test: CallTest) -> Outcome:
        candidate = self._candidate(test.setup)
        if isinstance(candidate, Outcome):
            return candidate
        answer = self._ask(candidate, {"call": test.name, "args": test.args, "kwargs": test.kwargs})
        if "raised" in answer:
            return Outcome("raised", answer["message"])
        right = self._satisfies(test, answer["ok"])
        return Outcome("passed") if right else Outcome("wrong", f"{test.name}: another value")

    def _program(self, test: ProgramTest) -> Outcome:
        source = self._source.encode()
        data = len(source).to_bytes(8, "big") + source + test.stdin.encode()
        with Sandbox.start(self._tier, self._limits, "program", self._options.command) as sandbox:
            self._deadline += sandbox.start_s  # a busy machine's delay is not the solution's
            printed = sandbox.communicate(data, self._soon())
        same = _lines(printed.decode("utf-8", "replace")) == _lines(test.stdout)
        return Outcome("passed") if same else Outcome("wrong", "printed something else")

    def _referee(self, test: RefereeTest) -> Outcome:
        candidate = self._candidate(test.setup)
        if isinstance(candidate, Outcome):
            return candidate
        with Sandbox.start(self._tier, self._limits, "referee") as referee:
            self._deadline += referee.start_s
            deadline = self._soon()
            question = {"nonce": "", "test": test.source, "setup": test.setup, "functions": test.functions}
            referee.send(question | {"entry_point": test.entry_point}, deadline)
            while "verdict" not in (message := referee.receive(deadline)):
                call = {"call": message["call"], "args": message["args"], "kwargs": message["kwargs"]}
                referee.send(self._ask(candidate, call), deadline)
        return _verdict(test, message)

    # --- the candidate ------------------------------------------------------------------------------------------------

    def _candidate(self, setup: str) -> Sandbox | Outcome:
        """The sandbox with the solution loaded after `setup`, or why it does not load."""
        if self._sandbox is not None and self._setup == setup:
            return self._sandbox
        self._drop()
        sandbox = self._stack.enter_context(Sandbox.start(self._tier, self._limits, "calls"))
        self._deadline += sandbox.start_s
        answer = self._ask(sandbox, {"source": self._source, "setup": setup})
        if "raised" in answer:
            self._drop()
            return Outcome("raised", f"does not load: {answer['message']}")
        self._sandbox, self._setup = sandbox, setup
        return sandbox

    def _ask(self, sandbox: Sandbox, question: dict[str, Any]) -> dict[str, Any]:
        """The answer, checked: {"ok": wire} or {"raised": text, "message": text}. Raises Breach."""
        answer = sandbox.ask(question, self._soon())
        if "raised" in answer:
            return {"raised": printable(answer["raised"], 100), "message": printable(answer.get("message", ""), 300)}
        try:
            return {"ok": check(answer["ok"])}
        except (KeyError, WireError) as error:
            raise Breach("protocol", f"answered with no value: {error}") from None

    def _satisfies(self, test: CallTest, value: Wire) -> bool:
        match test.relation:
            case "true" | "false":
                return compare.truthy(value) == (test.relation == "true")
            case "close":
                return compare.close(test.expected, value, *test.tolerance)
        same = compare.equal(test.expected, value, self._options.tolerance, self._options.strict_sequences)
        return same == (test.relation == "equal")

    def _soon(self) -> float:
        """When the next answer must be there (monotonic seconds)."""
        return min(self._deadline, time.monotonic() + self._limits.test_s)

    def _drop(self) -> None:
        self._sandbox = None
        self._stack.close()


def _verdict(test: RefereeTest, message: dict[str, Any]) -> Outcome:
    """What the referee, which is trusted, says. Raises DataError where the test, not the solution, is at fault."""
    if message["verdict"] == "error" or message["calls"] == 0:
        shown = repr(test.source[:120])
        reason = message["message"] or "It ends without a call"
        raise DataError(f"metadata.tests assert = {shown}: must run and call the solution. {reason}. Correct the test.")
    return Outcome("passed") if message["verdict"] == "passed" else Outcome("wrong", printable(message["message"], 300))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
