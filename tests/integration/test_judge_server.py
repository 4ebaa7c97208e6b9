"""The judge against vLLM's own OpenAI server: a tiny untrained model's nonsense becomes errors, and never a 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from rewards.judge import JudgeReplyError, counts
from rewards.registry import Score
from rewards.scorer import Scorer
from rlhf.config import Exaone4TinyModel, RewardsConfig, ServerConfig
from rlhf.models import prepare_model
from rlhf.samples import RewardFailed, RewardValue, SampleGroup, ScoredGroup
from rlhf.servers import KEY_VARIABLE
from tests.integration.vllm_server import Running, vllm_server
from tests.rewards.judge_server import JudgeServer, ask, ask_many, compares, serving

pytestmark = pytest.mark.integration

Given = dict[str, Any]
CONTEXT_TOKENS = 4096  # a token a byte: the prompt alone has some 1300
SETTINGS = {"max_tokens": 48, "deadline_s": 120.0, "attempt_s": 60.0, "structured": "never"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("judge")
    model = prepare_model(Exaone4TinyModel(kind="exaone4_tiny", max_context_tokens=CONTEXT_TOKENS), 0, folder / "model")
    config = ServerConfig(
        kind="chat", model=str(model), dtype="float32", max_context_tokens=CONTEXT_TOKENS, max_concurrent_requests=4
    )
    with vllm_server(config, folder) as started:
        yield started


@pytest.fixture
def endpoint(server: Running, monkeypatch: pytest.MonkeyPatch) -> Given:
    monkeypatch.setenv(KEY_VARIABLE, server.key)
    return {**server.endpoint, **SETTINGS}


@pytest.fixture
def judge_server(server: Running) -> JudgeServer:
    return JudgeServer(server.url, compares)  # for its address alone: vLLM answers


def counted() -> Counter[str]:
    return Counter(counts())


@pytest.mark.parametrize("structured", ["always", "never"])
def test_nonsense_is_an_error_and_never_a_value(judge_server: JudgeServer, endpoint: Given, structured: str) -> None:
    before = counted()
    texts = [f"City {structured} {row}" for row in range(4)]
    seen = ask_many(judge_server, texts, {**endpoint, "structured": structured})
    assert [type(one) for one in seen] == [JudgeReplyError] * 4
    new = counted() - before
    # A reply that the token limit cut is found before it is read as a verdict.
    assert new["calls"] == 4 and new["retries"] == 0 and new["reply_errors"] <= 4
    assert new["tokens"] > 4 * 1000


def test_an_error_is_asked_about_again_and_a_verdict_is_not(judge_server: JudgeServer, endpoint: Given) -> None:
    before = counted()
    for _ in range(2):
        assert isinstance(ask_many(judge_server, ["Paris"], endpoint)[0], JudgeReplyError)
    assert (counted() - before)["calls"] == 2
    with serving(compares) as rule:  # a verdict of a judge of the same name, by the same questions
        assert ask(rule, "Paris", {**endpoint, "base_url": rule.url}).value == 1.0
    before = counted()
    remembered = ask(judge_server, "Paris", endpoint)
    assert (remembered.value, remembered.parts["cached"]) == (1.0, 1.0)
    assert counted() - before == Counter(cache_hits=1)


def test_a_gated_completion_costs_the_server_nothing(judge_server: JudgeServer, endpoint: Given) -> None:
    before = counted()
    assert ask(judge_server, "Solution:", endpoint) == Score(0.0, "gate: no answer but 'Solution:'", {"gated": 1.0})
    assert counted() - before == Counter()


def test_canaries_reach_the_server(judge_server: JudgeServer, endpoint: Given) -> None:
    before = counted()
    ask_many(judge_server, ["Rome"], endpoint, canaries={"rate": 1.0})
    new = counted() - before
    assert (new["calls"], new["canaries"], new["canary_errors"]) == (2, 1, 1)


def test_a_scorer_masks_and_counts_what_the_judge_cannot_say(
    endpoint: Given, make_scored: Callable[..., ScoredGroup]
) -> None:
    component: Given = {"deadline_s": 150.0, "retries": 0, "params": {"endpoint": endpoint}}
    scorer = Scorer(RewardsConfig.model_validate({"components": {"judge": component}}))
    try:
        outcomes = scorer.score(judged_group(make_scored)).outcomes
        metrics = scorer.metrics()
    finally:
        scorer.close()
    assert [type(outcome) for outcome in outcomes] == [RewardFailed, RewardFailed, RewardValue]
    assert outcomes[2].reason.startswith("gate:")
    assert metrics["reward_service/judge/calls"] == 3
    assert metrics["reward_service/judge/errors/raised"] == 2


def judged_group(make_scored: Callable[..., ScoredGroup]) -> SampleGroup:
    """Two completions that are judged and one that fails a gate."""
    group = make_scored((0.0, 0.0, 0.0)).group
    rendered = replace(group.rendered, prompt=replace(group.rendered.prompt, reward="judge", answer="Paris"))
    samples = (*group.samples[:2], replace(group.samples[2], completion=":"))
    return replace(group, rendered=rendered, samples=samples)
