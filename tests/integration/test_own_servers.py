"""The run's own model servers with real vLLM: a reward model, a judge, and a judge whose server dies in mid-run.

The judge is a tiny untrained model: its nonsense becomes errors, and never a 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rewards.judge import JudgeReplyError, counts
from rewards.preference import preference
from rewards.registry import RewardInput, Score
from rewards.scorer import Scorer
from rewards.servers.local import running
from rlhf.config import Exaone4TinyModel, RewardsConfig, ServerConfig
from rlhf.models import prepare_model
from rlhf.samples import Prompt, RewardFailed, RewardValue, TextGroup
from rlhf.servers import KEY_VARIABLE
from tests.rewards.judge_server import JudgeServer, ask, ask_many, compares, serving

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
START_DEADLINE_S = 300.0
CONTEXT_TOKENS = 4096  # of the judge, a token a byte: its prompt alone has some 1300

Given = dict[str, Any]


@dataclass(frozen=True)
class Running:
    """A server that is healthy. Whoever asks it puts `key` into the environment."""

    url: str
    model: str
    key: str

    @property
    def endpoint(self) -> Given:
        return {"base_url": self.url, "model": self.model, "api_key_env": KEY_VARIABLE, "deadline_s": 120.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("reward_model"))


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    """A judge and a reward model. They start side by side, which takes little longer than one."""
    folder = tmp_path_factory.mktemp("servers")
    judge = prepare_model(Exaone4TinyModel(kind="exaone4_tiny", max_context_tokens=CONTEXT_TOKENS), 0, folder / "judge")
    configs = {
        "judge": ServerConfig(
            kind="chat", model=str(judge), dtype="float32", max_context_tokens=CONTEXT_TOKENS, max_concurrent_requests=4
        ),
        "scores": ServerConfig(
            kind="reward_model", model=str(model), dtype="float32", max_context_tokens=512, max_concurrent_requests=8
        ),
    }
    with running(configs, "cpu", folder, START_DEADLINE_S) as started:
        yield {name: Running(started.urls[name], config.model, started.key) for name, config in configs.items()}


# --- a reward model ---------------------------------------------------------------------------------------------------

PROMPT = ({"role": "user", "content": "How do I boil an egg?"},)
COMPLETIONS = ("Seven minutes in boiling water.", "No.", "계란을 7분 동안 삶으세요.", "egg, " * 40 + "egg")


def reward_model(folder: Path) -> Path:
    """An untrained sequence classifier with one label, and a tokenizer that has a chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    base = prepare_model(Exaone4TinyModel(kind="exaone4_tiny"), 0, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=1.0)  # so that scores differ well beyond rounding
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def transformers_scores(path: Path, completions: tuple[str, ...]) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    scores = []
    for completion in completions:
        chat = [*PROMPT, {"role": "assistant", "content": completion}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            scores.append(float(model(ids).logits[0, 0]))
    return scores


@pytest.fixture
def scores(servers: dict[str, Running]) -> Running:
    return servers["scores"]


def values(server: Running, monkeypatch: pytest.MonkeyPatch, *seen: RewardInput, **params: Any) -> list[Any]:
    monkeypatch.setenv(KEY_VARIABLE, server.key)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(preference(one, endpoint=server.endpoint, **params) for one in seen))

    return asyncio.run(all_of_them())


def test_the_served_scores_are_those_of_transformers(
    scores: Running, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = values(scores, monkeypatch, *(RewardInput.of(text, messages=PROMPT) for text in COMPLETIONS))
    raw, expected = [one.parts["raw"] for one in found], transformers_scores(model, COMPLETIONS)
    assert raw == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert all(0.0 < one.value < 1.0 and one.parts["tokens"] > 10 for one in found)


def test_the_thinking_is_not_shown_to_the_model(scores: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    text = COMPLETIONS[0]
    thought = RewardInput.of(f"<think>Eggs.</think>{text}", messages=PROMPT)
    plain = RewardInput.of(text, messages=PROMPT)
    one, same = values(scores, monkeypatch, thought, plain)
    (other,) = values(scores, monkeypatch, replace(thought), prompt={"final_only": False})
    assert one.parts["raw"] == pytest.approx(same.parts["raw"], abs=1e-4)
    assert abs(other.parts["raw"] - one.parts["raw"]) > 1e-3


def test_a_template_of_ones_own_takes_the_place_of_the_models(scores: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = RewardInput.of("Seven minutes.", messages=PROMPT)
    (one,) = values(scores, monkeypatch, seen, prompt={"template": "{prompt}\n\n{completion}"})
    (other,) = values(scores, monkeypatch, seen)
    assert abs(one.parts["raw"] - other.parts["raw"]) > 1e-3


def test_nobody_is_answered_without_the_key(scores: Running) -> None:
    for path in ("/classify", "/v1/models", "/tokenize", "/metrics"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(scores.url.removesuffix("/v1") + path, timeout=30)


# --- a judge ----------------------------------------------------------------------------------------------------------

SETTINGS = {"max_tokens": 16, "deadline_s": 120.0, "attempt_s": 60.0, "structured": "never"}


@pytest.fixture
def endpoint(servers: dict[str, Running], monkeypatch: pytest.MonkeyPatch) -> Given:
    monkeypatch.setenv(KEY_VARIABLE, servers["judge"].key)
    return {**servers["judge"].endpoint, **SETTINGS}


@pytest.fixture
def judge_server(servers: dict[str, Running]) -> JudgeServer:
    return JudgeServer(servers["judge"].url, compares)  # for its address alone: vLLM answers


def counted() -> Counter[str]:
    return Counter(counts())


@pytest.mark.parametrize("structured", ["always", "never"])
def test_nonsense_is_an_error_and_never_a_value(judge_server: JudgeServer, endpoint: Given, structured: str) -> None:
    before = counted()
    texts = [f"City {structured} {row}" for row in range(4)]
    # Enough tokens to end the JSON of a verdict.
    seen = ask_many(judge_server, texts, {**endpoint, "structured": structured, "max_tokens": 48})
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
    endpoint: Given, make_text: Callable[..., TextGroup]
) -> None:
    component: Given = {"deadline_s": 150.0, "retries": 0, "params": {"endpoint": endpoint}}
    scorer = Scorer(RewardsConfig.model_validate({"components": {"judge": component}}))
    try:
        outcomes = scorer.score(judged_group(make_text)).outcomes
        metrics = scorer.metrics()
    finally:
        scorer.close()
    assert [type(outcome) for outcome in outcomes] == [RewardFailed, RewardFailed, RewardValue]
    assert outcomes[2].reason.startswith("gate:")
    assert metrics["reward_service/judge/calls"] == 3
    assert metrics["reward_service/judge/errors/raised"] == 2


def judged_group(make_text: Callable[..., TextGroup]) -> TextGroup:
    """Two completions that are judged and one that fails a gate."""
    prompt = Prompt("p", ({"role": "user", "content": "1+1=?"},), "Paris", "judge")
    return make_text(("the completion of g0/0", "the completion of g0/1", ":"), prompt=prompt)


# --- a whole run ------------------------------------------------------------------------------------------------------

# Only additions are judged: whatever the untrained judge is asked about has no verdict and does not train.
SMALL = (
    "experiment=quickstart_judge", "servers=judge", "stages.sft.steps=100", "stages.sft.batch_size=32",
    "stages.sft.optimizer.warmup_steps=0", "stages.rl.steps=12", "stages.rl.prompts_per_step=4",
    "stages.rl.evaluate_every=0", "stages.rl.optimizer.warmup_steps=0", "rollouts.group_size=4",
    "rollouts.max_completion_tokens=24", "evaluation.prompts=8", "evaluation.samples_per_prompt=4",
    "data.train.reward=spread", "rewards.components.judge.applies=always", "rewards.components.judge.weight=0.0",
    "rewards.components.judge.where={family: [addition]}", "rewards.components.judge.params.endpoint.max_tokens=16",
    "rewards.components.judge.params.endpoint.structured=never", "rewards.components.spread={}",
    "rewards.components.judge.retries=0", "rewards.error_budget=1.0", "servers.judge.dtype=float32",
    "servers.judge.max_concurrent_requests=8", "tracking=local",
)  # fmt: skip

SPREAD = """
from rewards import reward

@reward("spread")
def spread(sample):
    return (sum(map(ord, sample.completion)) % 10) / 10
"""


def server_pid(model: Path) -> int | None:
    """The process of the run's own server that serves `model`."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "--served-model-name" in words and str(model) in words:
            return int(entry.parent.name)
    return None


def steps(root: Path) -> list[dict[str, Any]]:
    path = root / "latest" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [one for one in map(json.loads, lines) if one["stage"] == "rl" and "server/judge/restarts" in one]


def left_behind(root: Path) -> list[str]:
    """Command lines of processes that name `root` or have it in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(root).encode() in text and int(entry.name) != os.getpid():
            found.append(text[:200].decode(errors="replace"))
    return found


@pytest.mark.slow
def test_a_run_goes_on_when_its_judges_server_dies_and_leaves_nothing_behind(tmp_path: Path) -> None:
    root, plugin = tmp_path / "runs", tmp_path / "spread.py"
    plugin.write_text(SPREAD)
    judge = prepare_model(Exaone4TinyModel(kind="exaone4_tiny", max_context_tokens=4096), 0, tmp_path / "judge")
    given = (f"servers.judge.model={judge}", f"run_root={root}", f"rewards.modules=[{plugin}]")
    output = tmp_path / "output"
    with output.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "launch.py", *SMALL, *given],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: bool(steps(root)) or run.poll() is not None)
        assert run.poll() is None, output.read_text()
        pid = server_pid(judge)
        assert pid is not None
        environment = dict(
            pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair
        )
        key = environment["VLLM_API_KEY"]
        os.kill(pid, signal.SIGKILL)
        assert run.wait(500) == 0, output.read_text()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    first, *_, last = steps(root)
    assert first["server/judge/restarts"] == 0.0 and last["server/judge/restarts"] == 1.0
    assert last["server/judge/up"] == 1.0
    # What was asked meanwhile waited for the server: the only errors are what the untrained judge says.
    raised = "reward_service/judge/errors/raised"
    assert last[raised] > first.get(raised, 0)
    assert [name for name in last if name.startswith("reward_service/judge/errors/")] == [raised]
    assert "Restart 1 of 3." in (root / "latest" / "logs" / "server-judge.log").read_text()
    until(lambda: not left_behind(tmp_path), 30.0)
    assert "now: raised: JudgeReplyError" in replayed(root / "latest")
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if key.encode() in path.read_bytes()], "the key of the run is written down"
    assert key not in output.read_text()


def replayed(run_dir: Path) -> str:
    """What `replay` says of a sample that the judge had no verdict on: it starts the run's server again for that."""
    records = map(json.loads, (run_dir / "reward_failures.jsonl").read_text().splitlines())
    sample = next(one["sample_id"] for one in records if "JudgeReplyError" in one["message"])
    command = [sys.executable, "-m", "rewards", "replay", sample, "--run", str(run_dir)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 1, done.stderr
    return done.stdout


def until(happened: Callable[[], bool], within_s: float = 400.0) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)
