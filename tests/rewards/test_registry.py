"""The author's contract: registration, lookup, loading, and what counts as a reward."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards import registry
from rewards.registry import Abstain, InvalidRewardError, RewardInput, Score, lookup, names, reward
from rlhf.errors import ConfigError
from rlhf.plugins import load_modules

SAMPLE = RewardInput.of("12", "12")


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names()
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    loaded = set(sys.modules)
    yield
    for name in set(sys.modules) - loaded:
        if name.startswith("plugin_"):
            del sys.modules[name]


def judge(returned: object, **bounds: Any) -> Score | Abstain:
    reward("under_test", **bounds)(lambda sample: returned)
    return lookup("under_test").judge(SAMPLE, {})


def test_the_decorator_registers_the_function_and_returns_it_unchanged() -> None:
    @reward
    def plain(sample: RewardInput) -> bool:
        return sample.final == sample.answer

    @reward("named", low=-1.0)
    def other(sample: RewardInput, scale: float, offset: float = 0.0) -> float:
        return scale + offset

    assert plain(SAMPLE) is True
    assert lookup("plain").judge(SAMPLE, {}) == Score(1.0)
    assert lookup("named").judge(SAMPLE, {"scale": -0.5}) == Score(-0.5)
    assert (lookup("named").low, lookup("named").high) == (-1.0, 1.0)
    assert lookup("named").accepts == ("scale", "offset")
    assert lookup("named").requires == ("scale",)
    assert lookup("plain").location.startswith(__file__)


@pytest.mark.parametrize(("returned", "value"), [(True, 1.0), (False, 0.0), (1, 1.0), (0.25, 0.25)])
def test_bools_and_numbers_are_values(returned: object, value: float) -> None:
    assert judge(returned) == Score(value)


def test_numpy_numbers_are_values() -> None:
    numpy = pytest.importorskip("numpy")
    verdict = judge(numpy.float32(0.5))
    assert isinstance(verdict, Score)
    assert type(verdict.value) is float


def test_an_abstention_and_a_full_score_pass_through() -> None:
    assert judge(Abstain("no reference")) == Abstain("no reference")
    registry._REGISTERED.pop("under_test")
    assert judge(Score(0.5, "half", {"recall": 0.5})) == Score(0.5, "half", {"recall": 0.5})


@pytest.mark.parametrize("returned", [math.nan, math.inf, -math.inf, Score(math.nan), Score(0.5, "", {"x": math.inf})])
def test_a_value_that_is_not_finite_is_an_error(returned: object) -> None:
    with pytest.raises(InvalidRewardError, match="must be finite"):
        judge(returned)


@pytest.mark.parametrize("returned", ["1.0", [1.0], {"score": 1}, 1j, object(), Score("1")])  # type: ignore[arg-type]
def test_a_value_of_the_wrong_type_is_an_error(returned: object) -> None:
    with pytest.raises(InvalidRewardError, match="must be float, bool, Abstain or Score"):
        judge(returned)


def test_none_is_an_error_that_points_to_abstain() -> None:
    with pytest.raises(InvalidRewardError, match=r"Return Abstain\(reason\)"):
        judge(None)


@pytest.mark.parametrize(("returned", "bounds"), [(1.5, {}), (-0.1, {}), (3, {"low": 0.0, "high": 2.0})])
def test_a_value_outside_the_declared_range_is_an_error(returned: float, bounds: dict[str, float]) -> None:
    with pytest.raises(InvalidRewardError, match="must lie in"):
        judge(returned, **bounds)


def test_an_unknown_name_lists_all_and_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"reward = 'mth': must be one of .*math.*Did you mean math\?"):
        lookup("mth")


def test_the_built_in_rewards_are_always_known() -> None:
    assert {"math", "format"} <= set(names())


def test_a_second_registration_names_both_places() -> None:
    judge(1.0)
    with pytest.raises(ConfigError) as refused:
        judge(1.0)
    assert str(refused.value).count(f"{__file__}:") == 2


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be below"):
        reward("empty_range", low=1.0, high=1.0)(lambda sample: 1.0)


def test_a_file_registers_its_rewards_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from rewards import reward\n@reward\ndef from_a_file(sample):\n    return 1.0\n")
    load_modules("rewards.modules", [str(path)])
    load_modules("rewards.modules", [str(path)])
    assert lookup("from_a_file").location == f"{path}:2"


@pytest.mark.parametrize(
    ("content", "reason"), [("import no_such_module_xyz", "no_such_module_xyz"), ("1 / 0", "1 / 0")]
)
def test_a_module_that_cannot_be_imported_is_a_config_error_with_its_traceback(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"rewards\.modules") as refused:
        load_modules("rewards.modules", [str(path)])
    assert reason in str(refused.value)
    with pytest.raises(ConfigError, match=r"rewards\.modules"):
        load_modules("rewards.modules", [str(path)])


def test_a_missing_dotted_module_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no_such_package_xyz"):
        load_modules("rewards.modules", ["no_such_package_xyz.rewards"])


@pytest.mark.parametrize(
    ("completion", "mode", "reasoning", "final"),
    [
        ("<think>\na\n</think>\n\nb", True, "a", "b"),
        ("a</think>b", True, "a", "b"),
        ("<think>a</think>b</think>c", True, "a</think>b", "c"),
        ("<think>a, never closed 12", True, "", ""),
        ("12", True, "", ""),
        ("12", False, "", "12"),
        ("<think>12", False, "", ""),
        ("compare <think> tags", False, "", "compare <think> tags"),
    ],
)
def test_the_final_answer_starts_after_the_last_closed_thinking(
    completion: str, mode: bool, reasoning: str, final: str
) -> None:
    sample = RewardInput.of(completion, reasoning_mode=mode)
    assert (sample.reasoning, sample.final) == (reasoning, final)
