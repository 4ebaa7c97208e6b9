import itertools
import math
import re

import pytest

from rewards.registry import RewardInput, Score, lookup
from rlhf.errors import ConfigError
from rollouts.tasks import HELD_OUT_SHARE, Problem, TaskFamily, family_names, get_family

DIFFICULTIES = range(1, 6)
NUMERIC = [name for name in family_names() if get_family(name).reward == "math"]
ARITHMETIC = ("addition", "subtraction", "three_term_sum", "multiplication", "modulo")


def solve(name: str, question: str) -> int:
    """An independent solution, from the question's text alone."""
    body = question.removesuffix("=?")
    if name in ARITHMETIC:
        assert re.fullmatch(r"[0-9+\-*%]+", body)
        return eval(body)
    inner = body[body.index("(") + 1 : -1]
    match name:
        case "gcd":
            return math.gcd(*map(int, inner.split(",")))
        case "maximum":
            return max(map(int, inner.split(",")))
        case "sort_digits":
            return int("".join(sorted(inner)))
        case "digit_sum":
            return sum(map(int, inner))
        case "count_letter":
            letter, word = inner.split(",")
            return word.count(letter)
    raise AssertionError(f"no independent solution for {name}")


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("name", NUMERIC)
def test_answers_agree_with_an_independent_solution(name, difficulty):
    family = get_family(name)
    for index in range(100):
        problem = family.draw(difficulty, "train", seed=5, index=index)
        assert int(problem.answer) == solve(name, problem.question)
        assert problem.trace
        assert "\n" not in problem.trace


@pytest.mark.parametrize("name", ["addition", "subtraction", "three_term_sum", "multiplication", "gcd", "modulo"])
def test_every_step_of_an_arithmetic_trace_is_true(name):
    for index in range(300):
        problem = get_family(name).draw(1 + index % 5, "train", seed=1, index=index)
        for step in problem.trace.split(","):
            total, *links = step.split("=")
            for link in links:  # `7+8=15+3=18` is a chain: each result goes on with the operation after it
                assert re.fullmatch(r"[0-9+\-*%]+", total)
                result = re.match(r"\d+", link).group()
                assert eval(total) == int(result), problem
                total = link


@pytest.mark.parametrize("name", ["addition", "subtraction", "three_term_sum"])
def test_column_traces_spell_the_answer_from_right_to_left(name):
    for index in range(300):
        problem = get_family(name).draw(1 + index % 5, "train", seed=2, index=index)
        results = [step.split("=")[-1] for step in problem.trace.split(",")]
        spelled = results[-1] + "".join(result[-1] for result in reversed(results[:-1]))
        assert int(spelled) == int(problem.answer), problem


def test_difficulty_two_has_two_digit_operands():
    for name in ("addition", "subtraction", "three_term_sum", "multiplication", "maximum"):
        numbers = re.findall(r"\d+", get_family(name).draw(2, "train", seed=0, index=3).question)
        assert all(len(number) == 2 for number in numbers)


@pytest.mark.parametrize("name", ["addition", "subtraction", "three_term_sum"])
def test_a_worked_answer_at_difficulty_two_stays_within_forty_byte_tokens(name):
    problems = [get_family(name).draw(2, "train", seed=0, index=index) for index in range(1000)]
    closing = len("\n") + 1 + len("\n\n") + 1  # </think> and the end of turn are one token each
    assert max(len(problem.trace) + closing + len(problem.answer) for problem in problems) <= 40


def test_a_draw_is_a_pure_function_of_seed_and_index():
    family = get_family("addition")
    draws = [family.draw(2, "train", seed=9, index=index) for index in range(50)]
    assert [family.draw(2, "train", seed=9, index=index) for index in reversed(range(50))] == draws[::-1]
    assert [family.draw(2, "train", seed=8, index=index) for index in range(50)] != draws


def test_problem_numbers_are_the_same_in_every_version():
    family = get_family("addition")
    draws = [family.draw(2, split, seed=0, index=7).question for split in ("train", "held_out")]
    assert draws == ["74+82=?", "93+54=?"]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("name", family_names())
def test_every_family_has_problems_in_both_splits(name, difficulty):
    for split in ("train", "held_out"):
        problem = get_family(name).draw(difficulty, split, seed=0, index=0)
        assert get_family(name).split_of(problem) == split


@pytest.mark.parametrize(("name", "difficulty"), [("addition", 1), ("addition", 2), ("gcd", 1), ("sort_digits", 2)])
def test_the_splits_are_disjoint_and_cover_the_whole_space(name, difficulty):
    family = get_family(name)
    train = {problem.canonical for problem in family.distinct(difficulty, "train", seed=0)}
    held_out = {problem.canonical for problem in family.distinct(difficulty, "held_out", seed=1)}
    everything = {family.problem(difficulty, number).canonical for number in range(family.size(difficulty))}
    assert not train & held_out
    assert train | held_out == everything


def test_about_an_eighth_is_held_out():
    family = get_family("three_term_sum")
    splits = [family.split_of(family.problem(2, number)) for number in range(0, 729_000, 97)]
    assert splits.count("held_out") / len(splits) == pytest.approx(HELD_OUT_SHARE, abs=0.01)


def test_commuted_operands_are_one_problem():
    for name in ("addition", "three_term_sum", "multiplication", "gcd", "maximum", "sort_digits", "digit_sum"):
        family = get_family(name)
        parameters = [5, 2, 9][: len(family.axes(1))]
        assert len({family.pose(*order).canonical for order in itertools.permutations(parameters)}) == 1


def test_distinct_gives_no_problem_twice():
    problems = list(itertools.islice(get_family("three_term_sum").distinct(2, "held_out", seed=3), 2000))
    assert len({problem.canonical for problem in problems}) == 2000


def test_an_unknown_family_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"families = adition: .* Did you mean addition"):
        get_family("adition")


def test_a_family_with_one_held_out_problem_among_hundreds_is_drawn_from():
    base = get_family("addition")
    rare = next(base.distinct(2, "held_out", seed=0))
    problems = [rare, *itertools.islice(base.distinct(2, "train", seed=0), 500)]
    small = TaskFamily("addition", lambda difficulty: (problems,), lambda problem: problem)
    assert small.draw(2, "held_out", seed=0, index=0) == rare
    assert list(small.distinct(2, "held_out", seed=0)) == [rare]


@pytest.mark.parametrize(
    ("name", "question", "hasty"),
    [("addition", "77+63=?", "30"), ("subtraction", "61-22=?", "49"), ("three_term_sum", "48+47+12=?", "97")],
)
def test_a_hasty_answer_forgets_to_carry(name, question, hasty):
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    problem = get_family(name).pose(*numbers)
    assert (problem.question, problem.hasty) == (question, hasty)
    assert problem.hasty != problem.answer


# --- families with a reward of their own ------------------------------------------------------------------------------


def judged(name: str, problem: Problem, text: str) -> Score:
    turn = {"role": "user", "content": problem.question}
    sample = RewardInput.of(text, problem.answer, messages=(turn,), metadata=problem.metadata)
    verdict = lookup(get_family(name).reward).judge(sample, {})
    assert isinstance(verdict, Score)
    return verdict


def in_tokens(problem: Problem) -> int:
    """Of a worked answer, with the byte tokenizer; `</think>` and the end of turn are one token each."""
    return len(problem.trace) + len("\n") + 1 + len("\n\n") + len(problem.answer) + 1


def test_families_name_the_reward_that_verifies_them():
    rewards = {name: get_family(name).reward for name in family_names()}
    assert {name: reward for name, reward in rewards.items() if reward != "math"} == {
        "program": "code",
        "constrained": "instruction_following",
    }
    assert len(NUMERIC) == 10


@pytest.mark.parametrize("difficulty", [1, 2, 5])
def test_the_right_program_passes_its_tests_and_the_hasty_one_does_not(difficulty):
    for index in range(3):
        problem = get_family("program").draw(difficulty, "train", seed=1, index=index)
        assert judged("program", problem, problem.answer).value == 1.0, problem
        assert judged("program", problem, problem.hasty).value == 0.0, problem


def test_the_tests_of_a_program_agree_with_its_words():
    words = {"plus": "+", "minus": "-", "times": "*"}
    for index in range(300):
        problem = get_family("program").draw(1 + index % 5, "train", seed=3, index=index)
        formula = " ".join(words.get(word, word) for word in problem.canonical.split())
        for test in problem.metadata["tests"]:
            a, b = test["args"]
            assert eval(formula, {"a": a, "b": b}) == test["expected"]
            assert eval(problem.trace, {"a": a, "b": b}) == test["expected"]


def test_the_inputs_of_a_program_tell_all_formulas_apart():
    family = get_family("program")
    expected = {}
    for number in range(family.size(1)):
        problem = family.problem(1, number)
        values = tuple(test["expected"] for test in problem.metadata["tests"])
        expected.setdefault(values, set()).add(problem.canonical)
    assert len(expected) == family.size(1)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_right_text_follows_every_instruction_and_the_hasty_one_does_not(difficulty):
    family = get_family("constrained")
    for index in range(100):
        problem = family.draw(difficulty, "train", seed=1, index=index)
        verdict = judged("constrained", problem, problem.answer)
        assert verdict.value == 1.0, (problem, verdict)
        assert len(verdict.parts) == 4  # three instructions and the fraction
        assert judged("constrained", problem, problem.hasty).value == 0.0, problem


def test_every_right_text_of_the_quickstart_is_accepted():
    family = get_family("constrained")
    for number in range(family.size(2)):
        problem = family.problem(2, number)
        assert judged("constrained", problem, problem.answer).value == 1.0, problem


@pytest.mark.parametrize(("name", "limit"), [("program", 49), ("constrained", 45)])
def test_worked_answers_of_the_quickstarts_fit_their_token_limits(name, limit):
    family = get_family(name)
    problems = [family.problem(2, number) for number in range(0, family.size(2), 5)]
    assert max(map(in_tokens, problems)) <= limit
    assert max(len(problem.question) + 12 for problem in problems) <= 64  # 12: the chat template
