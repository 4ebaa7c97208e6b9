"""The reward `code`: records, comparison, assert rewriting, and grading under every tier this machine gives."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from rewards.code import CodeResult, Limits, Options, Tier, code, grade, parse
from rewards.code.asserts import candidate_names, rewrite
from rewards.code.compare import equal
from rewards.code.extract import PYTHON, last_block
from rewards.code.inside.wire import WireError, check, decode, encode
from rewards.code.suites import CallTest, RefereeTest
from rewards.code.tiers import probe
from rewards.registry import RewardInput
from rlhf.errors import ConfigError, DataError

SQUARE = {"tests": [{"call": "f", "args": [n], "expected": n * n} for n in (2, 3)]}
LIMITS = Limits(wall_s=20, test_s=10)


@pytest.fixture(params=[Tier.STRONG, Tier.USERNS, Tier.LANDLOCK])
def tier(request: pytest.FixtureRequest) -> Tier:
    chosen: Tier = request.param
    if (problem := probe(chosen)) is not None:
        pytest.skip(f"{chosen}: {problem}")
    return chosen


def run(source: str, metadata: dict[str, Any], tier: Tier | None = None, **options: Any) -> CodeResult:
    return grade(source, parse(metadata), LIMITS, Options(**options), tier)


# --- grading ----------------------------------------------------------------------------------------------------------


def test_a_right_solution_passes_and_a_wrong_one_fails(tier: Tier) -> None:
    assert run("def f(x): return x * x", SQUARE, tier).passed
    wrong = run("def f(x): return x + 2", SQUARE, tier, stop_at_first=False)
    assert [outcome.kind for outcome in wrong.outcomes] == ["passed", "wrong"]
    assert wrong.tier is tier


def test_a_program_is_judged_by_what_it_prints(tier: Tier) -> None:
    metadata = {"tests": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "4 5\n", "stdout": "9\n\n"}]}
    assert run("print(sum(map(int, input().split())))", metadata, tier).passed
    assert not run("print(3)", metadata, tier).passed


def test_a_humaneval_check_that_cannot_be_rewritten_runs_in_a_referee(tier: Tier) -> None:
    source = "def check(candidate):\n    for n in range(4):\n        assert candidate(n) == n * n\n"
    metadata = {"tests": [{"assert": source, "entry_point": "f"}]}
    assert isinstance(parse(metadata)[0], RefereeTest)
    assert run("def f(x): return x * x", metadata, tier).passed
    assert run("def f(x): return x + 2", metadata, tier).outcomes[0].kind == "wrong"


def test_a_referee_sees_the_candidates_exceptions_as_builtin_ones() -> None:
    source = "try:\n    f(-1)\n    raised = False\nexcept ValueError:\n    raised = True\nassert raised"
    metadata = {"tests": [{"assert": source}]}
    assert run("class Mine(ValueError): pass\ndef f(x): raise Mine('no')", metadata).passed
    assert not run("def f(x): raise KeyError('no')", metadata).passed


def test_a_solution_is_other_languages_by_a_command() -> None:
    metadata = {"tests": [{"stdin": "b\na\n", "stdout": "a\nb"}]}
    if run("sort", metadata, command=(".sh", "sh", "{source}")).tier is Tier.LANDLOCK:
        pytest.skip("no place for a file under landlock")
    assert run("sort", metadata, command=(".sh", "sh", "{source}")).passed
    assert not run("cat", metadata, command=(".sh", "sh", "{source}")).passed


def test_after_a_crash_the_other_tests_still_count_for_partial_credit() -> None:
    source = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x * x"
    assert [o.kind for o in run(source, SQUARE, stop_at_first=False).outcomes] == ["ended", "passed"]
    assert [o.kind for o in run(source, SQUARE).outcomes] == ["ended", "not run"]


def test_prints_of_a_solution_do_not_disturb() -> None:
    assert run("print('loaded')\ndef f(x):\n    print('PASSED' * 1000)\n    return x * x", SQUARE).passed


def test_memory_and_time_are_bounded(tier: Tier) -> None:
    tests = parse(SQUARE)
    short = Limits(wall_s=20, test_s=0.5)
    assert grade("def f(x):\n    while True: pass", tests, short, tier=tier).outcomes[0].kind == "timeout"
    small = Limits(wall_s=20, test_s=10, memory_bytes=64 << 20)
    eaten = grade("def f(x):\n    a = bytearray(400 << 20)\n    return x * x", tests, small, tier=tier)
    assert eaten.outcomes[0].kind in ("memory", "raised", "ended")


def test_files_are_bounded_however_much_time_there_is(tier: Tier) -> None:
    source = "def f(x):\n    for n in range(200000): open(f'/tmp/{n}', 'w').close()\n    return x * x"
    result = grade(source, parse(SQUARE), Limits(wall_s=60, test_s=60), tier=tier)
    assert result.outcomes[0].kind in ("memory", "raised")


# --- the reward -------------------------------------------------------------------------------------------------------


def reward(completion: str, metadata: dict[str, Any] = SQUARE, **params: Any) -> float:
    return code(RewardInput.of(completion, metadata=metadata), **params).value


def test_the_reward_takes_the_last_block_after_the_thinking() -> None:
    right, wrong = ("```python\ndef f(x): return x * x\n```", "```python\ndef f(x): return 0\n```")
    assert reward(f"<think>{wrong}</think>Here:\n{right}") == 1.0
    assert reward(f"<think>{right}</think>Here:\n{right}\n{wrong}") == 0.0
    assert reward(f"<think>\n{right}\n</think>No code.") == 0.0


def test_partial_credit_is_the_share_of_tests_that_pass() -> None:
    answer = "```python\ndef f(x): return 4\n```"
    assert reward(answer) == 0.0
    assert reward(answer, partial_credit=True) == 0.5


def test_the_tier_is_in_the_parts_and_the_reason() -> None:
    score = code(RewardInput.of("```python\ndef f(x): return x * x\n```", metadata=SQUARE))
    tier = score.reason.split(":")[0]
    assert score.parts[f"tier_{tier}"] == 1.0


def test_without_a_sandbox_the_reward_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Tier:
        raise ConfigError(["no sandbox"])

    monkeypatch.setattr("rewards.code.reward.self_test", refuse)
    with pytest.raises(ConfigError, match="no sandbox"):
        reward("```python\ndef f(x): return x * x\n```")
    assert reward("```python\ndef f(x): return x * x\n```", allow_unsafe=True) == 1.0
    assert "WITHOUT a sandbox" in caplog.text


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, r"metadata.tests = None: must be a non-empty list"),
        ([], r"metadata.tests = \[\]: must be a non-empty list"),
        ([{"cal": "f"}], r"metadata.tests\[0\] = .*must have call, stdin or assert"),
        ([{"call": "f", "args": [1]}], r"expected is missing"),
        ([{"call": "f", "args": 1, "expected": 1}], r"args = 1: must be a list"),
        ([{"call": "f()", "args": [], "expected": 1}], r"must be a function's name"),
        ([{"stdin": 1, "stdout": ""}], r"tests\[0\].stdin = 1: must be text"),
        ([{"assert": "assert f(1) =="}], r"must be Python"),
        ([{"assert": "assert 1 == 1"}], r"must call the solution"),
        ([{"assert": "assert f(1) == 1"}, {"stdin": "", "stdout": ""}], r"must not mix"),
    ],
)
def test_broken_tests_are_an_error_that_names_the_rule(tests: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        reward("no code at all", {"tests": tests})


def test_a_referee_test_that_never_calls_the_solution_is_an_error() -> None:
    metadata = {"tests": [{"assert": "for _ in []:\n    f(1)"}]}
    with pytest.raises(DataError, match="must run and call the solution"):
        run("def f(x): return x", metadata)


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\na\n```\ntext\n```python\nb\n```\nend", "b\n"),
        ("~~~python\na = '```'\n~~~", "a = '```'\n"),
        ("```python\nx = 1\n", None),
        ("```python\na\n```\n```bash\nls\n```", None),
        ("x = 1", None),
    ],
)
def test_the_program_is_the_last_closed_block(text: str, found: str | None) -> None:
    assert last_block(text, PYTHON) == found


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        (1, True, False),
        (True, 1, False),
        (0, False, False),
        (1, 1.0, True),
        (2.0, 2, True),
        (0.0, -0.0, True),
        (None, False, False),
        (None, 0, False),
        ("1", 1, False),
        ([], {}, False),
        ([1, 2], (1, 2), True),
        ([1, 2], [2, 1], False),
        ({1, 2}, {2, 1}, True),
        ({1, 2}, [1, 2], False),
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}, True),
        ({"a": 1}, {"a": True}, False),
        (float("nan"), float("nan"), True),
        (1.0, float("nan"), False),
        (float("nan"), 1.0, False),
        (float("inf"), 1e308, False),
        (0.1 + 0.2, 0.3, True),
        (3, 3.0000000001, False),
        (10**400, 10**400, True),
        (1.0, 10**400, False),
        (10**400, 1e300, False),
        (b"a", b"a", True),
        (b"a", "61", False),
        (1j, 1j, True),
        ({(1, 2): "x"}, {(1, 2): "x"}, True),
        ({1: 2}, {"1": 2}, False),
    ],
)
def test_values_are_compared_by_type(expected: Any, given: Any, same: bool) -> None:
    assert equal(encode(expected), check(encode(given)), 1e-9) is same


def test_sequences_can_be_told_apart() -> None:
    assert not equal(encode([1]), encode((1,)), strict_sequences=True)


@pytest.mark.parametrize(
    "value", [None, True, 7, -(10**4000), 1.5, float("-inf"), "é", [1, (2, {3})], {"a": {1: b"x"}}, 2j]
)
def test_a_value_survives_the_wire(value: Any) -> None:
    assert decode(check(encode(value))) == value


@pytest.mark.parametrize(
    "wire",
    [[1], ["list"], ["list", 1], ["dict", [[1]]], ["int", "5"], ["int", 5], ["float", "1.0"], ["x", []], {}, {"a": 1}],
)
def test_a_malformed_value_is_refused(wire: Any) -> None:
    with pytest.raises(WireError):
        check(wire)


def test_subclasses_travel_as_their_base_and_objects_not_at_all() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert encode(Liar(3)) == 3
    with pytest.raises(WireError):
        encode(object())


# --- rewriting asserts ------------------------------------------------------------------------------------------------


def cases(source: str, entry_point: str | None = None) -> Any:
    tree = ast.parse(source)
    return rewrite(tree, candidate_names(tree, (), entry_point), entry_point)


@pytest.mark.parametrize(
    ("source", "relation", "expected"),
    [
        ("assert f(1, [2]) == (4, -5)", "equal", (4, -5)),
        ("assert 3 == f(1)", "equal", 3),
        ("assert f(1) is None", "equal", None),
        ("assert f(1) is True, 'note'", "equal", True),
        ("assert f(1)", "true", None),
        ("assert not f(1)", "false", None),
        ("assert f(1) != set([1])", "unequal", {1}),
        ("import math\nassert math.isclose(f(1), 2.5, rel_tol=0.1)", "close", 2.5),
        ("assert abs(f(1) - 2.5) < 1e-6", "close", 2.5),
        ("assert f([0] * 3) == [1] * 3 + [2]", "equal", [1, 1, 1, 2]),
    ],
)
def test_a_constant_assertion_becomes_a_question(source: str, relation: str, expected: Any) -> None:
    (case,) = cases(source)
    assert (case.relation, decode(case.expected)) == (relation, expected)


@pytest.mark.parametrize(
    "source",
    [
        "x = f(1)\nassert x == 2",
        "assert f(g(1)) == 2",
        "assert sorted(f(1)) == [2]",
        "for i in range(2):\n    assert f(i) == i",
        "assert f(1) == 2 == 2",
        "assert f(1) == 10 ** 10 ** 10",
        "assert f('a' * 10 ** 9) == 1",
        "import random\nassert f(random.random()) == 1",
        "import os\nos.x = 1\nassert f(1) == 1",
    ],
)
def test_anything_else_is_left_to_the_referee(source: str) -> None:
    assert cases(source) is None


def test_a_humaneval_check_becomes_questions_to_its_entry_point() -> None:
    body = "    assert True, 'x'\n    assert candidate(2) == 4\n    assert candidate(3) == 9"
    source = f"METADATA = {{'a': 1}}\n\ndef check(candidate):\n{body}"
    metadata = {"entry_point": "f", "tests": [{"assert": source}]}
    tests = parse(metadata)
    assert [test.name for test in tests if isinstance(test, CallTest)] == ["f", "f"]
