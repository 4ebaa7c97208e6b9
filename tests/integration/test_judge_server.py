"""The judge against vLLM's own OpenAI server: a tiny untrained model's nonsense becomes errors, and never a 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewards.judge import JudgeReplyError, counts
from rewards.registry import Score
from rewards.scorer import Scorer
from rlhf.config import Exaone4TinyModel, RewardsConfig
from rlhf.models import prepare_model
from rlhf.samples import RewardFailed, RewardValue, SampleGroup, ScoredGroup
from rlhf.weight_sync.transports import free_port
from rollouts.vllm_engine import environment
from tests.rewards.judge_server import JudgeServer, ask, ask_many, compares, serving

pytestmark = pytest.mark.integration

MODEL = "judge"
CONTEXT_TOKENS = 4096  # a token a byte: the prompt alone has some 1300
START_DEADLINE_S = 300.0
ENDPOINT = {"model": MODEL, "max_tokens": 48, "deadline_s": 120.0, "attempt_s": 60.0, "structured": "never"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("judge")
    config = Exaone4TinyModel(kind="exaone4_tiny", max_context_tokens=CONTEXT_TOKENS)
    model, port = prepare_model(config, 0, folder / "model"), free_port()
    flags = {
        "model": model, "served-model-name": MODEL, "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": CONTEXT_TOKENS, "max-num-seqs": 4, "distributed-executor-backend": "uni",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env=os.environ | environment("cpu", 1)
        )
    try:
        wait_healthy(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"vLLM's server did not start:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture
def judge_server(url: str) -> JudgeServer:
    return JudgeServer(url, compares)  # for its address alone: vLLM answers


def counted() -> Counter[str]:
    return Counter(counts())


@pytest.mark.parametrize("structured", ["always", "never"])
def test_nonsense_is_an_error_and_never_a_value(judge_server: JudgeServer, structured: str) -> None:
    before = counted()
    texts = [f"City {structured} {row}" for row in range(4)]
    seen = ask_many(judge_server, texts, {**ENDPOINT, "structured": structured})
    assert [type(one) for one in seen] == [JudgeReplyError] * 4
    new = counted() - before
    # A reply that the token limit cut is found before it is read as a verdict.
    assert new["calls"] == 4 and new["retries"] == 0 and new["reply_errors"] <= 4
    assert new["tokens"] > 4 * 1000


def test_an_error_is_asked_about_again_and_a_verdict_is_not(judge_server: JudgeServer) -> None:
    before = counted()
    for _ in range(2):
        assert isinstance(ask_many(judge_server, ["Paris"], ENDPOINT)[0], JudgeReplyError)
    assert (counted() - before)["calls"] == 2
    with serving(compares) as rule:  # a verdict of a judge of the same name, by the same questions
        assert ask(rule, "Paris", ENDPOINT).value == 1.0
    before = counted()
    remembered = ask(judge_server, "Paris", ENDPOINT)
    assert (remembered.value, remembered.parts["cached"]) == (1.0, 1.0)
    assert counted() - before == Counter(cache_hits=1)


def test_a_gated_completion_costs_the_server_nothing(judge_server: JudgeServer) -> None:
    before = counted()
    assert ask(judge_server, "Solution:", ENDPOINT) == Score(0.0, "gate: no answer but 'Solution:'", {"gated": 1.0})
    assert counted() - before == Counter()


def test_canaries_reach_the_server(judge_server: JudgeServer) -> None:
    before = counted()
    ask_many(judge_server, ["Rome"], ENDPOINT, canaries={"rate": 1.0})
    new = counted() - before
    assert (new["calls"], new["canaries"], new["canary_errors"]) == (2, 1, 1)


def test_a_scorer_masks_and_counts_what_the_judge_cannot_say(url: str, make_scored: Callable[..., ScoredGroup]) -> None:
    component: dict[str, Any] = {
        "deadline_s": 150.0,
        "retries": 0,
        "params": {"endpoint": {**ENDPOINT, "base_url": url}},
    }
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
