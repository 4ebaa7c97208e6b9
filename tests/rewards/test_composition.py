"""How parts add up: gates, bounded bonuses, sources, schedules; the task metric stays apart. Real grader processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rewards.scorer import Scorer
from rlhf.config import RewardComponent, RewardsConfig
from rlhf.errors import ConfigError
from rlhf.samples import Abstained, Prompt, RewardFailed, RewardOutcome, RewardValue, TextGroup, TextSample

AUTHOR = """
from rewards import Abstain, RewardInput, reward

@reward("task")
def task(sample): return sample.final.startswith("right")

@reward("style", low=-10.0, high=10.0)
def style(sample):
    if "none" in sample.final: return Abstain("nothing to judge")
    if "fail" in sample.final: raise ValueError("boom")
    return 4.0

@reward("length", low=0.0, high=100.0, group=True)
def length(samples): return [float(len(sample.final)) for sample in samples]

@reward("needy", requires=("numpy", "a-package-nobody-has", "and_no_module"))
def needy(sample): return 1.0
"""


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("author") / "parts.py"
    path.write_text(AUTHOR)
    return str(path)


def config(author: str, **components: dict[str, Any]) -> RewardsConfig:
    return RewardsConfig.model_validate({"components": components, "modules": (author,), "memory_limit_mib": 512})


def group(*completions: str, version: int = 0, **metadata: Any) -> TextGroup:
    prompt = Prompt("p7", ({"role": "user", "content": "?"},), "42", "task", metadata)
    samples = tuple(TextSample(f"g7/{number}", text, 1, False) for number, text in enumerate(completions))
    return TextGroup("g7", prompt, False, version, samples)


@pytest.fixture(scope="module")
def scorer(author: str) -> Iterator[Scorer]:
    always = {"applies": "always"}
    components: dict[str, dict[str, Any]] = {
        "task": {"weight": 2.0},
        "style": {"weight": -0.5, "gate": "routed", "max_bonus": 0.75, **always},
        "length": {"weight_schedule": [[10, 0.0], [20, 0.1]], "gate": "style", "where": {"kind": ["long"]}, **always},
    }
    scorer = Scorer(config(author, **components))
    yield scorer
    scorer.close()


def value(outcome: RewardOutcome) -> RewardValue:
    assert isinstance(outcome, RewardValue)
    return outcome


def test_a_gated_part_counts_only_where_the_gate_is_correct(scorer: Scorer) -> None:
    right, wrong = map(value, scorer.score(group("right", "wrong")).outcomes)
    assert right.value == 2.0 - 0.75
    assert right.parts == {"task": 1.0, "style": 4.0, "style/counted": 1.0}
    assert wrong.value == 0.0
    assert wrong.parts == {"task": 0.0, "style": 4.0, "style/counted": 0.0}
    assert (right.task, wrong.task) == (1.0, 0.0)


def test_an_abstention_behind_a_closed_gate_does_not_matter_a_failure_does(scorer: Scorer) -> None:
    outcomes = scorer.score(group("right none", "wrong none", "wrong fail")).outcomes
    assert outcomes[0] == Abstained("style", "nothing to judge")
    assert value(outcomes[1]).value == 0.0
    assert isinstance(outcomes[2], RewardFailed)


@pytest.mark.parametrize(("version", "weight"), [(0, 0.0), (10, 0.0), (15, 0.05), (20, 0.1), (99, 0.1)])
def test_a_schedule_weighs_by_weight_version_and_gates_form_chains(scorer: Scorer, version: int, weight: float) -> None:
    right, wrong = map(value, scorer.score(group("right!", "wrong!", version=version, kind="long")).outcomes)
    assert right.value == pytest.approx(1.25 + 6 * weight)
    assert wrong.value == 0.0
    assert wrong.parts["length/counted"] == 0.0


@pytest.mark.parametrize("metadata", [{"kind": "short"}, {}])
def test_a_part_runs_only_for_its_sources(scorer: Scorer, metadata: dict[str, Any]) -> None:
    assert "length" not in value(scorer.score(group("right", **metadata)).outcomes[0]).parts


def test_a_gate_stays_closed_where_its_component_does_not_run(author: str) -> None:
    always = {"applies": "always"}
    components: dict[str, dict[str, Any]] = {
        "task": {},
        "style": {"where": {"reward": ["other"]}, **always},
        "length": {"gate": "style", **always},
    }
    scorer = Scorer(config(author, **components))
    outcome = value(scorer.score(group("right")).outcomes[0])
    scorer.close()
    assert (outcome.value, outcome.parts) == (1.0, {"task": 1.0, "length": 5.0, "length/counted": 0.0})


def test_a_missing_package_is_refused_at_start_with_the_command(author: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Scorer(config(author, needy={}))
    (problem,) = refused.value.problems
    assert problem.startswith("rewards.components.needy = {...}: needs a-package-nobody-has and and_no_module")
    assert problem.endswith("Install it: pip install a-package-nobody-has and_no_module")


def test_without_a_schedule_the_weight_is_constant() -> None:
    assert RewardComponent(weight=0.3).weight_at(7) == 0.3
    assert RewardComponent(weight_schedule=((4, 2.0),)).weight_at(1) == 2.0
