"""The scorer as a service: cache, retries with waits, metrics, health; counts add up whatever a reward does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rewards import scorer as scorer_module
from rewards.cache import AnswerCache, content_key
from rewards.child import Answer, Call, Failure
from rewards.registry import Abstain, RewardInput, Score
from rewards.scorer import Scorer, backoff_s
from rlhf.config import RewardsConfig
from rlhf.samples import (
    Prompt,
    RewardFailed,
    RewardValue,
    Scores,
    TextGroup,
    TextSample,
)

AUTHOR = """
import asyncio, os, pathlib, signal, sys, time
from rewards import Abstain, RewardInput, Score, TransientRewardError, reward

LEAK = []

def behave(sample, log):
    with open(log, "a") as file: file.write(sample.final + "\\n")
    how = sample.final.split()[0]
    if how == "exit": os._exit(1)
    if how == "nan": return float("nan")
    if how == "large": return 5.0
    if how == "text": return "1.0"
    if how == "raise": raise ValueError("always")
    if how == "abstain": return Abstain("no")
    if how == "leak":
        LEAK.append(bytearray(60 << 20))
        return 0.5
    if how == "transient":
        tries = pathlib.Path(log).read_text().splitlines().count(sample.final)
        if tries < 3: raise TransientRewardError("try again")
    return 0.5

@reward("task")
def task(sample, log: str = "/dev/null"):
    if sample.final.startswith("hang"): time.sleep(600)
    if sample.final.startswith("slow"): time.sleep(0.2)
    return behave(sample, log)

@reward("waiter")
async def waiter(sample, log: str = "/dev/null"):
    if sample.final.startswith("hang"): await asyncio.sleep(600)
    if sample.final.startswith("slow"): await asyncio.sleep(0.5)
    return behave(sample, log)

@reward("best", group=True)
def best(samples, log: str = "/dev/null"):
    if any("short" in sample.final for sample in samples): return [1.0]
    return [behave(sample, log) for sample in samples]
"""


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("author") / "service.py"
    path.write_text(AUTHOR)
    return str(path)


def started(author: str, *names: str, limit_mib: int = 512, entries: int = 100, **component: Any) -> Scorer:
    """A scorer with the components `names`, which share their settings and their processes."""
    parts = {name: {"deadline_s": 1.0, **component} for name in names}
    raw = {"components": parts, "modules": (author,), "memory_limit_mib": limit_mib, "cache_entries": entries}
    return Scorer(RewardsConfig.model_validate(raw))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def logged(log: Path) -> Counter[str]:
    """How often the functions were called with each completion since the last look."""
    counts = Counter(log.read_text().split())
    log.unlink()
    return counts


def group(*completions: str, reward: str = "task") -> TextGroup:
    prompt = Prompt("p7", ({"role": "user", "content": "?"},), "42", reward)
    samples = tuple(TextSample(f"g7/{number}", text, 1, False) for number, text in enumerate(completions))
    return TextGroup("g7", prompt, False, 0, samples)


def outcomes(scored: Scores) -> list[str]:
    return [one.kind if isinstance(one, RewardFailed) else type(one).__name__ for one in scored.outcomes]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "BACKOFF_S", 0.02)


def test_whatever_a_reward_does_every_sample_has_its_own_outcome_and_none_is_zero(author: str) -> None:
    hows = ["ok", "exit", "nan", "large", "text", "raise", "abstain", "hang", "transient", "ok too"]
    wanted = ["RewardValue", "crash", *["invalid"] * 3, "raised", "Abstained", "timeout", "transient", "RewardValue"]
    scorer = started(author, "task", "waiter", retries=0)
    for name in ("task", "waiter"):
        scored = scorer.score(group(*hows, reward=name))
        metrics = scorer.metrics()
        assert outcomes(scored) == wanted
        assert [one.value for one in scored.outcomes if isinstance(one, RewardValue)] == [0.5, 0.5]
        errors = {key.rpartition("/")[2]: value for key, value in metrics.items() if f"/{name}/errors/" in key}
        assert errors == Counter(kind for kind in wanted if kind.islower())
        assert metrics[f"reward_service/{name}/calls"] == 10
        assert metrics[f"reward_service/{name}/abstained"] == 1
        assert metrics["reward_service/queue"] == 0
    pids = scorer.pids()
    scorer.close()
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("name", ["task", "waiter"])
def test_processes_killed_in_the_middle_of_a_batch_lose_no_sample(author: str, name: str) -> None:
    scorer = started(author, name, deadline_s=20.0)
    scorer.score(group("ok", reward=name))
    results: list[Scores] = []
    work = group(*(f"slow {i}" for i in range(5)), reward=name)
    thread = threading.Thread(target=lambda: results.append(scorer.score(work)))
    thread.start()
    time.sleep(0.3)
    assert scorer.metrics()["reward_service/queue"] == 5
    for pid in scorer.pids():
        os.kill(pid, signal.SIGKILL)
    thread.join(60.0)
    scorer.close()
    assert outcomes(results[0]) == ["RewardValue"] * 5


def test_a_reward_that_leaks_memory_is_given_a_fresh_process(author: str) -> None:
    scorer = started(author, "task", limit_mib=400)
    before = scorer.pids()
    scored = scorer.score(group(*(f"leak {i}" for i in range(8))))
    metrics, after = scorer.metrics(), scorer.pids()
    scorer.close()
    assert outcomes(scored) == ["RewardValue"] * 8
    assert metrics["reward_service/task/errors/memory"] >= 1
    assert metrics["reward_service/task/retries"] == metrics["reward_service/task/errors/memory"]
    assert before != after


def test_what_its_author_calls_transient_is_tried_again_after_a_wait(author: str, log: Path) -> None:
    scorer = started(author, "task", "waiter", retries=2, params={"log": str(log)})
    for name in ("task", "waiter"):
        assert outcomes(scorer.score(group("transient", "ok", reward=name))) == ["RewardValue"] * 2
        assert logged(log) == {"transient": 3, "ok": 1}
    scorer.close()


def test_waits_double_with_jitter_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "BACKOFF_S", 0.5)
    waits = [backoff_s(attempts) for attempts in (1, 2, 3, 10)]
    assert all(low <= wait <= 3 * low for wait, low in zip(waits, (0.25, 0.5, 1.0, 15.0), strict=True))
    assert len({backoff_s(1) for _ in range(8)}) > 1


def test_a_group_reward_of_the_wrong_length_fails_every_sample(author: str) -> None:
    scorer = started(author, "best")
    scored = scorer.score(group("a", "short", "c", reward="best"))
    scorer.close()
    assert outcomes(scored) == ["invalid"] * 3
    (first, *_) = scored.outcomes
    assert isinstance(first, RewardFailed) and first.whole_group
    assert first.message.startswith("group reward 'best' returned 1 values for 3 samples")


# --- cache ------------------------------------------------------------------------------------------------------------


def test_the_same_sample_is_judged_once_and_errors_are_judged_again(author: str, log: Path) -> None:
    scorer = started(author, "task", "waiter", "best", params={"log": str(log)})
    for name in ("task", "waiter", "best"):
        first = scorer.score(group("a", "a", "abstain", reward=name))
        again = scorer.score(group("a", "a", "abstain", reward=name))
        for _ in range(2):
            assert outcomes(scorer.score(group("raise", reward=name))) == ["raised"]
        assert first.outcomes == again.outcomes
        assert logged(log) == {"a": 2 if name == "best" else 1, "abstain": 1, "raise": 2}
        assert scorer.metrics()[f"reward_service/{name}/cache_hits"] == (1 if name == "best" else 3)
    scorer.close()


@pytest.mark.parametrize("off", [{"cache": False}, {"entries": 0}])
def test_without_a_cache_every_score_judges(author: str, log: Path, off: dict[str, Any]) -> None:
    scorer = started(author, "task", params={"log": str(log)}, **off)
    for _ in range(2):
        scorer.score(group("a"))
    scorer.close()
    assert logged(log) == {"a": 2}


def answer(value: float) -> Answer:
    return Answer((Score(value),), 0.1)


def test_the_cache_is_bounded_and_forgets_the_longest_unused() -> None:
    cache = AnswerCache(2)
    cache.put(b"a", answer(1.0))
    cache.put(b"b", answer(2.0))
    assert cache.get(b"a") == answer(1.0)
    cache.put(b"c", answer(3.0))
    assert (cache.get(b"a"), cache.get(b"b"), len(cache)) == (answer(1.0), None, 2)


def test_the_cache_keeps_abstentions_and_no_failures() -> None:
    cache = AnswerCache(10)
    cache.put(b"a", Answer((Abstain("no"),), 0.1))
    cache.put(b"b", Answer((Score(1.0), Failure("invalid", "x")), 0.1))
    assert cache.get(b"a") is not None
    assert cache.get(b"b") is None


def test_the_key_changes_with_all_that_the_verdict_depends_on() -> None:
    def key(name: str = "r", version: str = "1", params: Any = None, **fields: Any) -> bytes:
        sample = RewardInput.of(**({"completion": "c", "answer": "a"} | fields))
        return content_key(Call(name, sample, params or {}, 1.0), version)

    changed = [
        key("other"), key(version="2"), key(params={"k": 1}), key(completion="d"), key(answer="b"),
        key(metadata={"k": 1}), key(truncated=True), key(messages=({"role": "user", "content": "?"},)),
    ]  # fmt: skip
    assert len({key(), *changed}) == 9
    assert key() == key(completion="".join(["c"]), answer="".join(["a"]))


# --- metrics and health -----------------------------------------------------------------------------------------------


def test_latencies_are_those_of_the_calls_and_every_process_is_healthy(author: str) -> None:
    scorer = started(author, "waiter")
    scorer.score(group("ok", "slow", reward="waiter"))
    metrics, health = scorer.metrics(), scorer.health()
    scorer.close()
    assert metrics["reward_service/waiter/latency_p50_s"] < 0.4
    assert metrics["reward_service/waiter/latency_p99_s"] > 0.4
    assert (health.processes, health.answered, health.failed) == (2, 2, 0)


def test_values_and_failures_add_up_to_the_samples(author: str) -> None:
    scorer = started(author, "task")
    scored = scorer.score(group("ok", "raise", "abstain"))
    scorer.close()
    kinds = Counter(type(one) for one in scored.outcomes)
    assert kinds[RewardValue] + kinds[RewardFailed] == 2
    assert sum(kinds.values()) == len(scored.outcomes) == 3
