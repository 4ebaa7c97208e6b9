"""The math verifier: traps, hostile answers, malformed references, and the references of GSM8K."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.math import extract, judge, math, normalise, reference
from rewards.processes import Call, Failure, ProcessPool, Verdict
from rewards.registry import RewardInput, Score
from rlhf.errors import DataError


def value(gold: str, final: str, question: str = "", **flags: bool) -> float:
    messages = ({"role": "user", "content": question},)
    return math(RewardInput.of(final, gold, messages=messages, **flags)).value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gold", "final"),
    [
        ("18", r"so \boxed{18}"),
        ("18", "The answer is 18 dollars per day."),
        ("18", "The answer is 18, since 9 * 2 = 18"),
        ("18", "9 * 2 = 18"),
        ("1,234", "1234"),
        ("50", "That is 50% of it", ),
        (r"\frac{3}{4}", r"\boxed{0.75}"),
        ("x^2+1", r"\boxed{1 + x^2}"),
        (r"4\sqrt{2}", r"\boxed{\sqrt{32}}"),
        (r"\left(3, \frac{\pi}{2}\right)", r"\boxed{(3, \pi/2)}"),
        (r"\text{Evelyn}", r"\boxed{Evelyn}"),
        (r"\text{(A)}", r"\boxed{A}"),
        (r"\{1,2\}", r"\boxed{2, 1}"),
        (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"),
        (r"3\sqrt{13}", r"\boxed{3√13}"),
        (r"-2 \le x \le 7", r"\boxed{[-2,7]}"),
        ("x=5", r"\boxed{5}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}"),
        (r"\boxed{18}", r"\boxed{18}"),
        ("x^2", r"The answer is $x^2$."),
        (r"(-\infty,3]", r"\boxed{x \le 3}"),
        (r"\{x \mid x > 3\}", r"\boxed{(3,\infty)}"),
        ("(1,4)", r"\boxed{y = 4,\ x = 1}"),
        (r"\langle 1,2 \rangle", r"\boxed{(1,2)}"),
        (r"\infty", r"\boxed{+\infty}"),
        (r"\emptyset", r"\boxed{\text{no solution}}"),
        (r"1,2,\ldots,10", r"\boxed{1,2,\dots,10}"),
        (r"\text{ellipse}", r"\boxed{\text{An ellipse}}"),
        (r"3:45 \text{ p.m.}", r"\boxed{3:45 p.m.}"),
        (r"\frac{dy}{dx} = 2x", r"\boxed{2x}"),
        ("42", r"\boxed{6 \times 7 = 42}"),
        ("60", r"\boxed{\angle ABC = 60^\circ}"),
        (r"\pi(R^2-r^2)", r"\boxed{\pi R^2 - \pi r^2}"),
        ("R_1+r_1", r"\boxed{r_1+R_1}"),
        ("4343_6", r"\boxed{4343_{\text{six}}}"),
        (r"\frac{1}{3}", r"\boxed{0.\overline{3}}"),
        (r"10\pi \text{ cm}^2", r"\boxed{10\pi}"),
    ],
)  # fmt: skip
def test_right_answers_get_one(gold: str, final: str) -> None:
    assert value(gold, final, "What percentage?") == 1.0


@pytest.mark.parametrize(
    ("gold", "final"),
    [
        ("18", r"\boxed{17}"),
        ("18", r"18 is wrong, \boxed{17}"),
        ("18", "The answer is 17, not 18 or so: 17"),
        ("10", r"\boxed{10\%}"),
        ("4", r"\boxed{4\sqrt(2)}"),
        ("385", r"\boxed{\sum_{k=1}^{10} k^2}"),
        ("18", r"\boxed{9 \times 2}"),
        ("18", r"\boxed{17, 18}"),
        ("18", r"\boxed{}"),
        (r"\frac{1}{2004!}", r"\boxed{\frac{1}{2006!}}"),
        ("(1,2)", r"\boxed{\{1,2\}}"),
        ("1,2", r"\boxed{(1,2)}"),
        ("[1,2)", r"\boxed{(1,2)}"),
        (r"\text{Evelyn}", r"\boxed{Briana}"),
        ("Evelyn", r"\boxed{Evlyne}"),
        ("x^2+1", r"\boxed{x^2+2}"),
        (r"\sqrt{2}", r"\boxed{\lim_{n \to \infty} \sqrt{2}}"),
        ("x^2", "no idea"),
        ("18", "The answer is unknown"),
        ("18", r"\boxed{18 \text{ is wrong}}"),
        ("18", r"\boxed{18} and \boxed{19}"),
        ("7", r"\boxed{x^2 = 7}"),
        ("7", r"\boxed{6 = 7}"),
        (r"\pi(R^2-r^2)", r"\boxed{\pi(r^2-R^2)}"),
        ("N-n", r"\boxed{0}"),
        ("43_5", r"\boxed{43_6}"),
        ("1:2:3", r"\boxed{1:3:2}"),
        ("(1,4)", r"\boxed{x=4, y=1}"),
        (r"12\text{ cm}", r"\boxed{12\text{ km}}"),
        (r"5\text{ m/s}", r"\boxed{5\text{ km/h}}"),
        (r"10\pi \text{ cm}^2", r"\boxed{10\pi \text{ m}^2}"),
        ("3", r"\boxed{3\mathrm{i}}"),
        (r"\frac{1}{100000000}", r"\boxed{\frac{1}{200000000}}"),
        (r"\frac{\pi}{10^{9}}", r"\boxed{\frac{2\pi}{10^{9}}}"),
        ("(-\\infty,3]", r"\boxed{x < 3}"),
    ],
)
def test_wrong_answers_get_zero(gold: str, final: str) -> None:
    assert value(gold, final) == 0.0


@pytest.mark.parametrize("completion", ["", "  ", "<think>the answer is 18"])
def test_no_final_answer_gets_zero_with_the_reason(completion: str) -> None:
    score = math(RewardInput.of(completion, "18", reasoning_mode=bool(completion.strip())))
    assert score == Score(0.0, "no final answer")


def test_an_answer_inside_the_thinking_does_not_count() -> None:
    assert math(RewardInput.of(r"<think>\boxed{18}</think>\boxed{17}", "18", reasoning_mode=True)).value == 0.0


def test_boxed_extraction_and_truncated_samples_need_a_box() -> None:
    assert math(RewardInput.of("18", "18"), extraction="boxed").value == 0.0
    assert math(RewardInput.of(r"\boxed{18}", "18"), extraction="boxed").value == 1.0
    assert value("18", "18", truncated=True) == 0.0
    assert value("18", r"\boxed{18} and", truncated=True) == 1.0


def test_an_unknown_extraction_is_refused() -> None:
    with pytest.raises(ValueError, match="boxed_or_last_number"):
        math(RewardInput.of("18", "18"), extraction="bxoed")  # type: ignore[arg-type]


@pytest.mark.parametrize("gold", ["", "   ", "$$", r"\frac{1}{2", "1/0", "9 * 2 = 18\n#### 18"])
def test_a_malformed_reference_raises_an_error_that_names_it(gold: str) -> None:
    with pytest.raises(DataError, match="answer = "):
        math(RewardInput.of("18", gold))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"x \le 5", r"x\leq5"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"y = 2x", "2x"),
        ("The Cat", "the cat"),
    ],
)
def test_spellings_that_mean_the_same_are_the_same(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


def test_case_and_order_still_matter_in_formulas() -> None:
    assert normalise("X") != normalise("x")
    assert normalise("(1,2)") != normalise("(2,1)")


@pytest.mark.parametrize(
    "hostile", ["9^{9^{9^9}}", "2^{10^{10}}", "100000000!", "(" * 3000 + "5" + ")" * 3000, "__import__('os').abort()"]
)
def test_hostile_answers_to_a_numeric_reference_are_never_evaluated(hostile: str) -> None:
    started = time.perf_counter()
    assert judge("5", hostile) == (False, "not a number")
    assert extract(rf"\boxed{{{hostile}}}", numeric=True) == hostile
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("gold", ["5", "x^2+1", r"\text{five}"])
@pytest.mark.parametrize(
    "answer", ["__import__('pathlib').Path('{}').touch()", "open('{}', 'w')", r"\text{{exec}}(\"open('{}','w')\")"]
)
def test_no_answer_is_ever_executed(gold: str, answer: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    assert value(gold, rf"\boxed{{{answer.format(marker)}}}") == 0.0
    assert not marker.exists()


def test_the_verifier_works_outside_the_main_thread() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(value, "x^2+1", r"\boxed{1+x^2}").result() == 1.0
        assert threads.submit(value, "x^2+1", r"\boxed{2+x^2}").result() == 0.0


def test_bare_and_boxed_references_are_judged_alike() -> None:
    for gold in ("x^2+1", r"\frac{\pi}{4}", r"(1, \sqrt{2})", r"\begin{pmatrix}1\\2\end{pmatrix}", "[1,2)"):
        assert value(gold, rf"\boxed{{{gold}}}") == value(rf"\boxed{{{gold}}}", rf"\boxed{{{gold}}}") == 1.0


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    pool = ProcessPool(1, 1 << 30)
    yield pool
    pool.close()


def test_hostile_expressions_do_not_hurt_those_that_wait_with_them(pool: ProcessPool) -> None:
    hostile = (
        "9^{9^{9^9}} + x",
        "2^{10^{10}} x",
        "(10^9)! + x",
        "(" * 450 + "x" + ")" * 450,
        r"\binom{10^{9}}{10^{8}} x",
    )
    calls = [Call("math", RewardInput.of(rf"\boxed{{{answer}}}", "x^2+1"), {}, 0.5) for answer in hostile]
    honest = Call("math", RewardInput.of(r"\boxed{1+x^2}", "x^2+1"), {}, 30.0)
    started = time.monotonic()
    verdicts = pool.run([call for hostile_one in calls for call in (honest, hostile_one)])
    assert time.monotonic() - started < 120.0
    assert verdicts[::2] == [Score(1.0, "right (math-verify): 1+x^2")] * len(calls)
    for verdict in verdicts[1::2]:
        assert verdict.value == 0.0 if isinstance(verdict, Score) else isinstance(verdict, Failure)
    assert pool.health().answered == 1


def test_hostile_expressions_stop_at_the_deadline_and_the_pool_goes_on(pool: ProcessPool) -> None:
    def run(answer: str, deadline_s: float) -> Verdict:
        return pool.run([Call("math", RewardInput.of(rf"\boxed{{{answer}}}", "x^2+1"), {}, deadline_s)])[0]

    assert run("1+x^2", 30.0) == Score(1.0, "right (math-verify): 1+x^2")
    for hostile in ("2^{10^{10}} x", "(" * 450 + "x" + ")" * 450):
        started = time.monotonic()
        verdict = run(hostile, 1.0)
        assert time.monotonic() - started < 30.0  # with the start of another process, on a busy machine
        assert isinstance(verdict, Failure) or verdict == Score(0.0, f"wrong (math-verify): {hostile[:80]}")
    too_long = "(" * 3000 + "x" + ")" * 3000
    assert run(too_long, 1.0) == Score(0.0, f"wrong (too long): {too_long[:80]}")
    assert run("1+x^2", 30.0) == Score(1.0, "right (math-verify): 1+x^2")


def gsm8k_references() -> list[str]:
    folder = os.environ.get("GROUPWISE_TEST_DATA")
    path = Path(folder or ".") / "gsm8k_test.jsonl"
    if folder is None or not path.exists():
        pytest.skip("set GROUPWISE_TEST_DATA to a folder with gsm8k_test.jsonl")
    with path.open() as lines:
        return [json.loads(line)["answer"].split("####")[1].strip() for _, line in zip(range(300), lines, strict=False)]


@pytest.mark.parametrize("wording", [r"\boxed{%s}", "The answer is $%s.", "so it is %s dollars.", "#### %s"])
def test_the_references_of_gsm8k_are_right_and_shifted_ones_wrong(wording: str) -> None:
    golds = gsm8k_references()
    assert len(golds) == 300
    for gold in golds:
        shifted = str(int(reference(gold).replace(",", "")) + 1)
        assert value(gold, wording % gold) == 1.0
        assert value(gold, wording % shifted) == 0.0
