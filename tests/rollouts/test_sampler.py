from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from rlhf.config import RunConfig
from rlhf.samples import Prompt, ScoredGroup
from rollouts.generator import GroupRequest
from rollouts.sampler import Progress, PromptSampler

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
        self.calls: list[Sequence[GroupRequest]] = []
        self.deadlines: list[float] = []

    def run(self, requests: Sequence[GroupRequest], deadline_s: float) -> list[ScoredGroup]:
        self.calls.append(requests)
        self.deadlines.append(deadline_s)
        return [self.make_scored([float(i) for i in range(r.samples)], group_id=r.group_id) for r in requests]


@pytest.fixture
def runner(make_scored: Callable[..., ScoredGroup]) -> Runner:
    return Runner(make_scored)


def sampler(runner: Runner, groups_in_flight: int = 3) -> PromptSampler:
    settings = {"stage": "easy", "samples": 4, "temperature": 0.9}
    return PromptSampler(runner, CONFIG, groups_in_flight=groups_in_flight, **settings)


def test_every_prompt_comes_back_once_in_order_with_its_number_in_the_id(runner: Runner) -> None:
    scored = list(sampler(runner).sample(PROMPTS, reasoning_mode=lambda _: True))
    assert [group.group.group_id for group in scored] == [f"easy-{number:06d}" for number in range(7)]
    assert [r.prompt for call in runner.calls for r in call] == PROMPTS
    assert {len(group.outcomes) for group in scored} == {4}


def test_no_more_groups_than_allowed_are_asked_for_at_once(runner: Runner) -> None:
    list(sampler(runner).sample(PROMPTS, reasoning_mode=lambda _: True))
    assert [len(call) for call in runner.calls] == [3, 3, 1]
    assert runner.deadlines == [40.0] * 3


def test_a_chunk_is_sampled_only_when_somebody_takes_its_groups(runner: Runner) -> None:
    groups = sampler(runner).sample(iter(PROMPTS), reasoning_mode=lambda _: True)
    assert runner.calls == []
    for _ in range(3):
        next(groups)
    assert len(runner.calls) == 1
    next(groups)
    assert len(runner.calls) == 2


def test_the_stage_sets_samples_and_temperature_and_the_run_the_rest(runner: Runner) -> None:
    list(sampler(runner).sample(PROMPTS, reasoning_mode=lambda number: number % 2 == 0))
    requests = [r for call in runner.calls for r in call]
    assert {(r.samples, r.temperature, r.max_tokens, r.top_p, r.top_k) for r in requests} == {(4, 0.9, 33, 1.0, 0)}
    assert [r.reasoning_mode for r in requests] == [True, False, True, False, True, False, True]


@pytest.mark.parametrize(("counted", "total"), [(list, 7), (iter, None)])
def test_progress_is_told_after_every_chunk(runner: Runner, counted: Callable[..., object], total: int | None) -> None:
    told: list[Progress] = []
    list(sampler(runner).sample(counted(PROMPTS), reasoning_mode=lambda _: True, progress=told.append))
    assert told == [Progress(3, total), Progress(6, total), Progress(7, total)]


def test_no_prompts_give_no_groups_and_no_call(runner: Runner) -> None:
    assert list(sampler(runner).sample([], reasoning_mode=lambda _: True)) == []
    assert runner.calls == []
