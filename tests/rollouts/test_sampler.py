from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from rlhf.config import RunConfig
from rlhf.samples import Prompt, ScoredGroup
from rollouts.engine import Sampling
from rollouts.generator import GroupRequest
from rollouts.sampler import sample_prompts

SOURCE = {"kind": "procedural"}
CONFIG = RunConfig.model_validate(
    {
        "experiment": "test",
        "model": {"kind": "exaone4_tiny"},
        "data": {"train": SOURCE, "evaluation": SOURCE},
        "stages": {"filter": {"kind": "filter"}},
        "algorithm": {"name": "grpo_icepop"},
        "rewards": {"components": {"math": {}}},
        "rollouts": {"max_completion_tokens": 33, "temperature": 0.7, "group_size": 5, "silence_deadline_s": 10},
    }
)
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "?"},), "", "math") for i in range(7)]


class Runner:
    """Sample `i` of a group has reward `i`."""

    def __init__(self, make_scored: Callable[..., ScoredGroup]) -> None:
        self.make_scored = make_scored
        self.requests: list[GroupRequest] = []

    def sample(self, requests: Iterable[GroupRequest]) -> Iterator[ScoredGroup]:
        for request in requests:
            self.requests.append(request)
            yield self.make_scored([float(i) for i in range(request.sampling.samples)], group_id=request.group_id)


@pytest.fixture
def runner(make_scored: Callable[..., ScoredGroup]) -> Runner:
    return Runner(make_scored)


def sampled(runner: Runner, prompts: Iterable[Prompt] = PROMPTS, **settings: Any) -> Iterator[ScoredGroup]:
    chosen = {"reasoning_mode": lambda _: True, "stage": "easy", "samples": 4, "temperature": 0.9, **settings}
    return sample_prompts(runner, CONFIG, prompts, **chosen)


def test_every_prompt_comes_back_once_in_order_with_its_number_in_the_id(runner: Runner) -> None:
    scored = list(sampled(runner))
    assert [group.group.group_id for group in scored] == [f"easy-{number:06d}" for number in range(7)]
    assert [request.prompt for request in runner.requests] == PROMPTS
    assert {len(group.outcomes) for group in scored} == {4}


def test_prompts_are_asked_only_when_somebody_takes_their_groups(runner: Runner) -> None:
    groups = sampled(runner, iter(PROMPTS))
    assert runner.requests == []
    next(groups)
    assert len(runner.requests) == 1


def test_the_stage_sets_samples_and_temperature_and_the_run_the_rest(runner: Runner) -> None:
    list(sampled(runner, reasoning_mode=lambda number: number % 2 == 0))
    assert {request.sampling for request in runner.requests} == {Sampling(4, 33, 0.9)}
    assert [r.reasoning_mode for r in runner.requests] == [True, False, True, False, True, False, True]


def test_progress_is_told_after_every_group(runner: Runner) -> None:
    told: list[int] = []
    list(sampled(runner, progress=told.append))
    assert told == [1, 2, 3, 4, 5, 6, 7]


def test_no_prompts_give_no_groups_and_no_call(runner: Runner) -> None:
    assert list(sampled(runner, [])) == []
    assert runner.requests == []
