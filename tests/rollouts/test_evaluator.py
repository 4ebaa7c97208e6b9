from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

from rlhf.config import RunConfig
from rlhf.samples import Prompt, ScoredGroup
from rollouts.engine import Sampling
from rollouts.evaluator import HeldOutEvaluator
from rollouts.generator import GroupRequest

SOURCE = {"kind": "procedural"}
CONFIG = RunConfig.model_validate(
    {
        "experiment": "test",
        "seed": 2,
        "model": {"kind": "exaone4_tiny"},
        "data": {"train": SOURCE, "evaluation": SOURCE},
        "stages": {"rl": {"kind": "rl", "steps": 1, "optimizer": {"learning_rate": 1e-4}}},
        "algorithm": {"name": "grpo_icepop"},
        "rewards": {"components": {"math": {}}},
        "evaluation": {"samples_per_prompt": 4, "pass_at": [1, 4], "temperature": 0.6},
        "rollouts": {"max_completion_tokens": 33, "top_p": 0.5},
    }
)
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "?"},), "", "math") for i in range(5)]


class Runner:
    """Greedy is right on even prompts; of the four samples one is."""

    def __init__(self, make_scored: Callable[..., ScoredGroup]) -> None:
        self.make_scored = make_scored
        self.requests: list[list[GroupRequest]] = []

    def sample(self, requests: Iterable[GroupRequest]) -> Iterator[ScoredGroup]:
        self.requests.append(list(requests))
        for request in self.requests[-1]:
            yield self.make_scored(self.rewards(request), group_id=request.group_id)

    def rewards(self, request: GroupRequest) -> tuple[float, ...]:
        if request.sampling.samples == 1:
            return (float(int(request.prompt.prompt_id[1:]) % 2 == 0),)
        return (1.0,) + (0.0,) * (request.sampling.samples - 1)


@pytest.fixture
def runner(make_scored: Callable[..., ScoredGroup]) -> Runner:
    return Runner(make_scored)


def evaluator(runner: Runner, prompts: Sequence[Prompt] = PROMPTS) -> HeldOutEvaluator:
    return HeldOutEvaluator(runner, prompts, CONFIG)


def test_greedy_and_sampled_figures_come_from_their_own_completions(runner: Runner) -> None:
    result = evaluator(runner).evaluate(5, reasoning_mode=True)
    assert result.greedy == pytest.approx(3 / 5)
    assert result.pass_at == {1: pytest.approx(1 / 4), 4: 1.0}
    assert (result.n_prompts, result.samples_per_prompt) == (5, 4)


def test_every_prompt_is_asked_once_greedily_and_once_with_samples(runner: Runner) -> None:
    evaluator(runner).evaluate(5, reasoning_mode=True)
    [requests] = runner.requests
    assert [(r.prompt, r.sampling) for r in requests[:5]] == [(p, Sampling(1, 33, 0.0)) for p in PROMPTS]
    assert [(r.prompt, r.sampling) for r in requests[5:]] == [(p, Sampling(4, 33, 0.6)) for p in PROMPTS]
    assert all(r.reasoning_mode for r in requests)


@pytest.mark.parametrize(("asked", "used"), [(3, 3), (5, 5), (9, 5)])
def test_the_first_prompts_are_used_or_all_there_are(runner: Runner, asked: int, used: int) -> None:
    assert evaluator(runner).evaluate(asked, reasoning_mode=False).n_prompts == used
    assert [r.prompt for r in runner.requests[0][:used]] == PROMPTS[:used]


def test_the_same_prompts_are_asked_every_time_so_that_figures_compare(runner: Runner) -> None:
    one = evaluator(runner)
    one.evaluate(3, reasoning_mode=True)
    one.evaluate(3, reasoning_mode=True)
    first, second = ([(r.prompt, r.sampling) for r in requests] for requests in runner.requests)
    assert first == second


def test_group_ids_never_repeat_over_evaluations(runner: Runner) -> None:
    one = evaluator(runner)
    one.evaluate(5, reasoning_mode=True)
    one.evaluate(5, reasoning_mode=False)
    ids = [r.group_id for requests in runner.requests for r in requests]
    assert len(set(ids)) == len(ids) == 20
