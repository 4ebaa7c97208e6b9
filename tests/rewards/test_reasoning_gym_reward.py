"""The scorers of reasoning-gym as a reward: a module of the same interface everywhere, the package where installed."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from rewards import reasoning_gym as module
from rewards.reasoning_gym import FORMULAS, LISTS, reasoning_gym, stated_answer
from rewards.registry import RewardInput, Score
from rlhf.errors import ConfigError, DataError

installed = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


# --- scorers of the kinds there are -----------------------------------------------------------------------------------


def exact(answer: str, entry: dict[str, Any]) -> float:
    return float(answer == entry["answer"])


def generous(answer: str, entry: dict[str, Any]) -> float:
    return 1.0 if answer == entry["answer"] else 0.5 if answer.isdigit() else 0.2


def strict_reader(answer: str, entry: dict[str, Any]) -> float:
    return float(int(answer) == int(entry["answer"]))


def blind(answer: str, entry: dict[str, Any]) -> float:
    return 1.0


def broken(answer: str, entry: dict[str, Any]) -> float:
    raise KeyError("a field that no entry has")


def careless(answer: str, entry: dict[str, Any]) -> float:
    return float(answer)


def destructive(answer: str, entry: dict[str, Any]) -> float:
    return float(answer == entry.pop("answer") and entry["metadata"].pop("fresh"))


def starved(answer: str, entry: dict[str, Any]) -> float:
    raise MemoryError


SCORERS = (exact, generous, strict_reader, blind, broken, careless, destructive, starved)


class FakeDataset:
    def __init__(self, score: Callable[[str, dict[str, Any]], float]) -> None:
        self.score_answer = score


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    sets = {score.__name__: score for score in SCORERS} | dict.fromkeys(LISTS | FORMULAS, blind)
    fake, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    fake.create_dataset = lambda name, seed: FakeDataset(sets[name])  # type: ignore[attr-defined]
    factory.DATASETS = sets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    module._dataset.cache_clear()
    yield
    module._dataset.cache_clear()


def judged(dataset: str, text: str, answer: str | None = "7", **params: Any) -> Score:
    entry = {"question": "3 + 4 =", "answer": answer, "metadata": {"fresh": True}}
    metadata = {"dataset": dataset, "params": {}, "entry": entry}
    return reasoning_gym(RewardInput.of(text, answer or "", metadata=metadata), **params)


@pytest.mark.usefixtures("package")
def test_full_marks_are_one_and_everything_else_is_zero() -> None:
    assert judged("exact", "7").value == 1.0
    assert judged("generous", "7") == Score(1.0, "scored 1", {"score": 1.0})
    assert judged("generous", "8") == Score(0.0, "scored 0.5", {"score": 0.5})


@pytest.mark.usefixtures("package")
def test_partial_credit_counts_only_above_what_any_text_gets() -> None:
    assert judged("generous", "7", partial_credit=True).value == 1.0
    assert judged("generous", "8", partial_credit=True).value == pytest.approx((0.5 - 0.2) / (1 - 0.2))
    assert judged("generous", "seven perhaps", partial_credit=True).value == 0.0


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("text", ["", "  \n", "<answer> </answer>", r"\boxed{}", "<think>7"])
def test_an_empty_answer_is_zero_whatever_the_scorer_pays(text: str) -> None:
    assert judged("generous", text).value == judged("blind", text, partial_credit=True).value == 0.0


@pytest.mark.usefixtures("package")
def test_what_the_scorer_cannot_read_is_zero_when_it_can_read_the_right_answer() -> None:
    verdict = judged("strict_reader", "seven")
    assert verdict.value == 0.0
    assert verdict.reason.startswith("the scorer cannot read it: ValueError")
    assert judged("strict_reader", "7").value == 1.0


@pytest.mark.usefixtures("package")
def test_a_scorer_that_cannot_read_the_right_answer_is_an_error_and_no_zero() -> None:
    with pytest.raises(DataError, match="cannot even read the right answer: KeyError"):
        judged("broken", "7")
    assert judged("broken", "7", answer=None).value == 0.0  # without a right answer nothing can be said


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("text", "value"), [("nan", 0.0), ("inf", 0.0), ("12", 1.0), ("-3", 0.0)])
def test_a_score_is_finite_and_within_zero_and_one(text: str, value: float) -> None:
    assert judged("careless", text).value == value


@pytest.mark.usefixtures("package")
def test_a_scorer_that_pays_any_text_in_full_is_an_error() -> None:
    with pytest.raises(DataError, match=r"metadata\.dataset = blind: must tell answers apart"):
        judged("blind", "anything")


@pytest.mark.usefixtures("package")
def test_memory_that_runs_out_is_no_fault_of_the_answer() -> None:
    with pytest.raises(MemoryError):
        judged("starved", "7")


@pytest.mark.usefixtures("package")
def test_a_scorer_cannot_change_the_record() -> None:
    entry = {"question": "?", "answer": "7", "metadata": {"fresh": True}}
    sample = RewardInput.of("7", "7", metadata={"dataset": "destructive", "entry": entry})
    assert [reasoning_gym(sample).value for _ in range(2)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("final", "answer"),
    [
        ("  12 ", "12"),
        ("It is <answer>\n1 2\n3 4\n</answer>, not <answer> 5 </answer> then", "5"),
        (r"So \boxed{x + 1}.", "x + 1"),
        ("a\nb", "a\nb"),
    ],
)
def test_the_answer_is_in_the_last_tags_or_box_or_all_of_the_text(final: str, answer: str) -> None:
    assert stated_answer(final) == answer


# --- answers that are evaluated ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("dataset", sorted(LISTS | FORMULAS))
@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "[c for c in ().__class__.__mro__[1].__subclasses__()]",
        "(lambda: 1)()",
        "x.func",
        "exec('1')",
        "9**9**9**9",
        "((((9**60)**60)**60)**60)",
        "2**(3**4**5)",
        "9" * 5000 + "*1",
        "f'{1:9999999999}'",
        "factorial(99999999)",
        "1e999999999",
        "x" * 20_000,
    ],
)
def test_an_answer_that_could_run_something_is_never_passed_on(dataset: str, text: str) -> None:
    verdict = judged(dataset, text)  # `blind` would raise if it saw it
    assert (verdict.value, verdict.parts) == (0.0, {"score": 0.0})


@installed
@pytest.mark.parametrize("dataset", sorted(LISTS | FORMULAS))
def test_the_right_answers_of_evaluating_data_sets_are_passed_on(dataset: str) -> None:
    import reasoning_gym as package

    items = package.create_dataset(dataset, seed=5, size=100)
    for index in range(4 if dataset == "intermediate_integration" else 10):
        entry = items[index]
        sample = RewardInput.of(entry["answer"], metadata={"dataset": dataset, "params": {}, "entry": entry})
        restated = "Integral(" in entry["answer"]  # what the package could not work out either: no answer
        assert reasoning_gym(sample).value == float(not restated), entry


@installed
def test_no_other_data_set_evaluates_the_answer() -> None:
    """These evaluate what they made themselves; a new one has to be read before it is listed here or in the reward."""
    from reasoning_gym.factory import DATASETS

    own = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic", "bf"}
    evaluating = set()
    for name, (dataset, _) in DATASETS.items():
        source = inspect.getsource(inspect.getmodule(dataset))
        if re.search(r"\b(eval|exec|parse_expr|sympify|interpret)\(", source):
            evaluating.add(name)
    assert evaluating - own == LISTS | FORMULAS


# --- the package ------------------------------------------------------------------------------------------------------


@installed
def test_text_that_answers_nothing_gets_nothing_from_any_data_set() -> None:
    import reasoning_gym as package
    from reasoning_gym.factory import DATASETS

    slow = {"composite", "intermediate_integration", "knight_swap", "quantum_lock", "sudoku"}
    refused = set()
    for name in sorted(DATASETS.keys() - slow):
        entry = package.create_dataset(name, seed=3, size=10)[0]
        for text in ("", "?", "I do not know", "the answer " * 40):
            sample = RewardInput.of(text, metadata={"dataset": name, "params": {}, "entry": entry})
            for partial in (False, True):
                try:
                    verdict = reasoning_gym(sample, partial_credit=partial)
                except DataError:
                    refused.add(name)
                    continue
                assert math.isclose(verdict.value, 0.0) or (partial and verdict.value < 0.2), (name, text, verdict)
    assert refused <= {"game_of_life_halting"}  # pays any text but "True" where the answer is False


@installed
@pytest.mark.parametrize("dataset", ["arc_1d", "chain_sum", "gcd", "letter_counting", "maze", "spell_backward"])
def test_right_answers_of_the_package_are_one_and_right_and_wrong_ones_zero(dataset: str) -> None:
    import reasoning_gym as package

    for entry in (package.create_dataset(dataset, seed=2, size=10)[index] for index in range(5)):
        metadata = {"dataset": dataset, "params": {}, "entry": entry}
        right = RewardInput.of(f"<think>so</think><answer>{entry['answer']}</answer>", metadata=metadata)
        wrong = RewardInput.of(f"{entry['answer']}7 or {entry['answer']}", metadata=metadata)
        assert (reasoning_gym(right).value, reasoning_gym(wrong).value) == (1.0, 0.0)


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"metadata\.dataset = None: must name a data set"),
        ({"dataset": "exact"}, r"metadata\.entry = None: must be an object with question, answer and metadata"),
        (
            {"dataset": "exakt", "entry": {"question": "", "answer": "", "metadata": {}}},
            r"metadata\.dataset = 'exakt': must be a data set of reasoning-gym",
        ),
    ],
)
def test_a_record_that_cannot_be_judged_is_an_error(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reasoning_gym(RewardInput.of("7", "7", metadata=metadata))


def test_without_the_package_the_error_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    module._dataset.cache_clear()
    with pytest.raises(ConfigError, match=r'pip install "groupwise\[reasoning-gym\]"'):
        judged("exact", "7")
