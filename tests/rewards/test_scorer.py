"""From samples to outcomes: routing, weights, retries, failures with their traceback, and the config errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.scorer import Scorer
from rlhf.config import RewardsConfig
from rlhf.errors import ConfigError
from rlhf.samples import (
    Abstained,
    Prompt,
    RewardFailed,
    RewardValue,
    TextGroup,
    TextSample,
)

AUTHOR = """
import os, pathlib, time
from rewards import Abstain, RewardInput, Score, reward

@reward("task", low=-1.0, high=2.0)
def task(sample: RewardInput, bonus: float = 0.0, log: str = ""):
    if log:
        with open(log, "a") as file: file.write(sample.final + "\\n")
    if sample.final == "hang": time.sleep(600)
    if sample.final == "exit": os._exit(1)
    if sample.final == "exit once":
        marker = pathlib.Path(log + ".marker")
        if not marker.exists():
            marker.touch()
            os._exit(1)
    if sample.final == "raise": return {}["a key the author expected"]
    if sample.final == "abstain": return Abstain("no verdict possible")
    if sample.final == "nan": return float("nan")
    if sample.final == "input": return Score(1.0, f"{sample.answer} {sample.metadata['level']} {sample.truncated}")
    return Score(0.5 + bonus, "half", {"recall": 0.25})

@reward("shape")
def shape(sample: RewardInput):
    return Abstain("empty") if not sample.final else len(sample.final) == 4
"""


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("author") / "author.py"
    path.write_text(AUTHOR)
    return str(path)


def config(author: str, **components: dict[str, Any]) -> RewardsConfig:
    return RewardsConfig.model_validate({"components": components, "modules": (author,), "memory_limit_mib": 512})


def group(*completions: str, reward: str = "task") -> TextGroup:
    prompt = Prompt("p7", ({"role": "user", "content": "?"},), "42", reward, {"level": 3})
    samples = tuple(TextSample(f"s{number}", text, 4, False) for number, text in enumerate(completions))
    return TextGroup("g7", prompt, False, 0, samples)


@pytest.fixture(scope="module")
def scorer(author: str) -> Iterator[Scorer]:
    components = {
        "task": {"weight": 2.0, "deadline_s": 0.4, "params": {"bonus": 0.25}},
        "shape": {"weight": -0.5, "applies": "always"},
        "math": {},
    }
    scorer = Scorer(config(author, **components))
    yield scorer
    scorer.close()


def failed(outcome: object) -> RewardFailed:
    assert isinstance(outcome, RewardFailed)
    return outcome


def test_a_value_is_the_weighted_sum_and_the_task_is_the_routed_value(scorer: Scorer) -> None:
    scored = scorer.score(group("four", "longer"))
    parts = {"task": 0.75, "shape": 1.0, "task/recall": 0.25}
    assert scored.outcomes[0] == RewardValue(2.0 * 0.75 - 0.5, 0.75, parts, "half")
    assert scored.outcomes[1] == RewardValue(1.5, 0.75, parts | {"shape": 0.0}, "half")
    assert scored.seconds > 0


def test_routed_components_of_other_prompts_do_not_run(scorer: Scorer) -> None:
    outcome = scorer.score(group("42", reward="math")).outcomes[0]
    assert isinstance(outcome, RewardValue)
    assert set(outcome.parts) == {"math", "shape"}
    assert outcome.task == 1.0


def test_the_reward_sees_the_prompt_s_answer_and_metadata(scorer: Scorer) -> None:
    outcome = scorer.score(group("input")).outcomes[0]
    assert isinstance(outcome, RewardValue)
    assert outcome.reason == "42 3 False"


def test_every_sample_of_a_mixed_group_has_exactly_one_outcome(scorer: Scorer) -> None:
    scored = scorer.score(group("four", "hang", "exit", "raise", "abstain", "nan", "", "fine"))
    kinds = [type(outcome).__name__ for outcome in scored.outcomes]
    assert kinds == ["RewardValue", *["RewardFailed"] * 3, "Abstained", "RewardFailed", "Abstained", "RewardValue"]
    assert [failed(scored.outcomes[row]).attempts for row in (1, 2, 3, 5)] == [2, 2, 1, 1]
    assert scored.outcomes[4] == Abstained("task", "no verdict possible")
    assert scored.outcomes[6] == Abstained("shape", "empty")


def test_a_failure_names_the_sample_and_has_the_author_s_traceback(scorer: Scorer, author: str) -> None:
    outcome = failed(scorer.score(group("raise")).outcomes[0])
    assert outcome.component == "task"
    assert outcome.message.startswith("KeyError")
    assert (outcome.kind, outcome.params) == ("raised", {"bonus": 0.25})
    assert re.search(rf'File "{re.escape(author)}", line \d+, in task', outcome.traceback)
    assert outcome.traceback.rstrip().endswith("KeyError: 'a key the author expected'")


@pytest.mark.parametrize(("how", "retries", "tries"), [("exit", 2, 3), ("exit", 0, 1), ("raise", 2, 1), ("hang", 1, 2)])
def test_only_failures_by_chance_are_retried(author: str, tmp_path: Path, how: str, retries: int, tries: int) -> None:
    log = tmp_path / "log"
    scorer = Scorer(config(author, task={"retries": retries, "deadline_s": 0.3, "params": {"log": str(log)}}))
    outcome = failed(scorer.score(group(how)).outcomes[0])
    scorer.close()
    assert outcome.attempts == tries
    assert log.read_text().split() == [how] * tries


def test_a_second_attempt_that_succeeds_is_a_value(author: str, tmp_path: Path) -> None:
    scorer = Scorer(config(author, task={"params": {"log": str(tmp_path / "log")}}))
    outcome = scorer.score(group("exit once")).outcomes[0]
    scorer.close()
    assert isinstance(outcome, RewardValue)


def test_a_prompt_with_an_unknown_reward_is_a_config_error_with_the_nearest_name(scorer: Scorer) -> None:
    with pytest.raises(ConfigError, match=r"prompt p7: reward = 'tsk'.*Did you mean task\?"):
        scorer.score(group("four", reward="tsk"))


def test_every_wrong_component_and_parameter_is_reported_at_once(author: str) -> None:
    components: dict[str, Any] = {
        "mth": {},
        "task": {"params": {"bonsu": 1.0}},
        "math": {"params": {"extraction": "boxed"}},
    }
    with pytest.raises(ConfigError) as refused:
        Scorer(config(author, **components))
    assert len(refused.value.problems) == 2
    assert "rewards.components = 'mth'" in refused.value.problems[0]
    assert "Did you mean math?" in refused.value.problems[0]
    assert "rewards.components.task.params = 'bonsu'" in refused.value.problems[1]
    assert "Did you mean bonus?" in refused.value.problems[1]


def test_close_leaves_no_process(author: str) -> None:
    scorer = Scorer(config(author, task={}))
    pids = scorer.pids()
    scorer.close()
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
