"""Rewards written for TRL, verl and OpenRLHF, unchanged, in real grader processes and over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rewards.foreign import Foreign
from rewards.processes import Answer, Call, Failure, ProcessPool
from rewards.registry import Abstain, RewardInput, Score
from rewards.scorer import Scorer, brought
from rewards.scorer import _wait_s as scorer_wait_s
from rlhf.config import RewardsConfig
from rlhf.errors import ConfigError
from rlhf.samples import Abstained, Prompt, RewardValue, TextGroup

THEIRS = """
import re

def format_reward_func(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", content) else 0.0 for content in contents]

def multi_task(prompts, completions, task, answer, **kwargs):
    assert prompts[0][-1]["role"] == "user" and len(prompts) == len(task) == len(answer)
    return [float(len(c[0]["content"])) if "short" not in c[0]["content"] else None for c in completions]

def plain_text(prompts, completions, level):
    return [float(p == "system text\\n\\nWhat?") + level_ for p, level_ in zip(prompts, level)]

async def waits(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.01)
    return [0.25 for _ in completions]

def needs_solution(completions, solution, **kwargs): return [0.0 for _ in completions]
def needs_ids(completion_ids, **kwargs): return [0.0 for _ in completion_ids]
def one_number(completions, **kwargs): return 1.0

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    if solution_str == "dict":
        return {"score": 0.5, "acc": True, "pred": "text", "depth": 3}
    if solution_str == "no score": return {"acc": 1.0}
    if solution_str == "nan": return {"score": float("nan")}
    assert data_source == "gsm8k" and extra_info == {"level": 2, "data_source": "gsm8k", "task": "m"}
    return float(solution_str == ground_truth) + bonus

class Tensor:
    def __init__(self, values): self.values = values
    def tolist(self): return self.values

def reward_func(queries, prompts, labels, **kwargs):
    assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts))
    hits = Tensor([[float(query.endswith(label))] for query, label in zip(queries, labels)])
    if queries[0].endswith("list"): return [1.0, 2.0]
    if queries[0].endswith("short"): return Tensor([1.0])
    return {"rewards": hits, "scores": hits, "extra_logs": {"half": Tensor([0.5] * len(queries))}}

def own(sample): return sample.final == sample.answer
not_a_function = 3
"""

DECORATED = """
from rewards import reward
@reward("mine", low=-2.0, high=2.0)
def signed(sample, sign: float = 1.0): return 2.0 * sign
"""

MESSAGES = ({"role": "system", "content": "system text"}, {"role": "user", "content": "What?"})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("theirs") / "theirs.py"
    path.write_text(THEIRS)
    path.with_name("decorated.py").write_text(DECORATED)
    return str(path)


@pytest.fixture(scope="module")
def pool(theirs: str, url: str) -> Iterator[ProcessPool]:
    """One pool with every function and server of others."""
    decorated = str(Path(theirs).with_name("decorated.py"))
    trl = ("format_reward_func", "multi_task", "waits", "needs_solution", "one_number")
    foreign = [
        *(Foreign(name, "trl", f"{theirs}:{name}") for name in trl),
        Foreign("plain_text", "trl", f"{theirs}:plain_text", conversational=False),
        Foreign("verl", "verl", f"{theirs}:compute_score"),
        Foreign("verl in a range", "verl", f"{theirs}:compute_score", low=0.0, high=0.5),
        Foreign("openrlhf", "openrlhf", f"{theirs}:reward_func"),
        Foreign("plain", "groupwise", f"{theirs}:own"),
        Foreign("mine", "groupwise", f"{decorated}:signed"),
        Foreign("again", "groupwise", f"{decorated}:signed"),
        Foreign("remote", "openrlhf", url=url),
        Foreign("unreachable", "openrlhf", url="http://127.0.0.1:9/get_reward"),
    ]
    pool = ProcessPool(1, 1 << 29, foreign=foreign)
    yield pool
    pool.close()


def sample(completion: str) -> RewardInput:
    metadata = {"level": 2, "data_source": "gsm8k", "task": "m"}
    return RewardInput.of(completion, "42", messages=MESSAGES, metadata=metadata)


def run(pool: ProcessPool, *calls: tuple[str, list[str]], **params: Any) -> list[Answer]:
    made = []
    for component, texts in calls:
        seen = tuple(sample(text) for text in texts)
        made.append(Call(component, seen if pool.rewards[component].group else seen[0], params, 10.0))
    return pool.answers(made)


def start(foreign: Foreign) -> None:
    ProcessPool(1, 1 << 29, foreign=[foreign]).close()


def values(answer: Answer) -> list[float | str]:
    return [verdict.value if isinstance(verdict, Score) else type(verdict).__name__ for verdict in answer.verdicts]


def message(answer: Answer) -> str:
    assert answer.failure is not None
    return answer.failure.message


def test_trl_functions_run_unchanged(pool: ProcessPool) -> None:
    names = ("format_reward_func", "multi_task", "waits", "needs_solution", "one_number", "plain_text")
    texts = ["<think>a</think>b", "short"]
    by_name = dict(zip(names, run(pool, *((name, texts) for name in names)), strict=True))
    assert values(by_name["format_reward_func"]) == [1.0, 0.0]
    assert values(by_name["multi_task"]) == [17.0, "Abstain"]
    assert by_name["multi_task"].verdicts[1] == Abstain("the function returned None")
    assert values(by_name["waits"]) == [0.25, 0.25]
    assert values(by_name["plain_text"]) == [3.0, 3.0]
    assert values(by_name["needs_solution"]) == ["Failure"] * 2
    assert "needs the column 'solution': the record has answer, data_source" in message(by_name["needs_solution"])
    assert "returned float: must be a list" in message(by_name["one_number"])


def test_a_trl_function_that_needs_the_trainer_is_refused_at_start(theirs: str) -> None:
    with pytest.raises(ConfigError, match=r"must not need completion_ids\. A reward here sees text"):
        start(Foreign("ids", "trl", f"{theirs}:needs_ids"))


def test_verl_functions_run_unchanged(pool: ProcessPool) -> None:
    calls = [("verl", [text]) for text in ("42", "41", "dict", "no score", "nan")]
    answers = run(pool, *calls, bonus=0.25)
    assert [values(answer)[0] for answer in answers] == [1.25, 0.25, 0.5, "Failure", "Failure"]
    assert answers[2].verdicts[0] == Score(0.5, "", {"acc": 1.0, "depth": 3.0})
    assert "without 'score': it has acc" in message(answers[3])


def test_openrlhf_functions_run_unchanged(pool: ProcessPool) -> None:
    answers = run(pool, *(("openrlhf", [text, "is 42"]) for text in ("is 41", "list", "short")))
    assert answers[0].verdicts[1] == Score(1.0, "", {"scores": 1.0, "half": 0.5})
    assert [values(answer) for answer in answers] == [[0.0, 1.0], [1.0, 2.0], ["Failure", "Failure"]]
    assert "returned 1 values for 2 samples" in message(answers[2])


def test_parameters_of_foreign_functions_are_known(pool: ProcessPool) -> None:
    verl, trl = pool.rewards["verl"], pool.rewards["waits"]
    assert (verl.accepts, verl.requires, verl.group, verl.is_async) == (("bonus",), (), False, False)
    assert (trl.accepts, trl.requires, trl.group, trl.is_async) == (None, (), True, True)


def test_own_functions_need_no_decorator_and_keep_theirs(pool: ProcessPool) -> None:
    answers = run(pool, ("plain", ["42"]), ("mine", ["x"]), ("again", ["x"]))
    assert [values(answer) for answer in answers] == [[1.0], [2.0], [2.0]]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("{}:compute_scor", "There is no function compute_scor in .* Did you mean compute_score?"),
        ("{}:not_a_function", "must name a function"),
        ("no_such_module_xyz:f", "must be importable"),
    ],
)
def test_a_path_without_a_function_is_refused_at_start(theirs: str, path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards\.components\.mine\.path = .*{problem}"):
        start(Foreign("mine", "verl", path.format(theirs)))


def test_a_foreign_reward_may_not_take_a_known_name(theirs: str) -> None:
    with pytest.raises(ConfigError, match="a name can be registered once"):
        start(Foreign("math", "verl", f"{theirs}:compute_score"))


def test_a_declared_range_is_held(pool: ProcessPool) -> None:
    answers = run(pool, ("verl in a range", ["dict"]), ("verl in a range", ["42"]))
    assert values(answers[0]) == [0.5]
    assert "must lie in [0, 0.5]" in message(answers[1])


# --- over HTTP --------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """OpenRLHF's protocol; the label of the first sample says how to behave."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(request)
        how = request["query"][0].rpartition("What?")[2]
        status = {"busy": 503, "refused": 400, "later": 429}.get(how, 200)
        if how == "later" and sum(one["query"] == request["query"] for one in self.seen) > 1:
            status = 200
        count = len(request["query"]) - (how == "short")
        body = "<html>" if how == "text" else json.dumps({"rewards": [0.5] * (count - 1) + [None]})
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/get_reward"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_speaks_openrlhf_is_a_reward(pool: ProcessPool) -> None:
    hows = ("good", "busy", "refused", "text", "short")
    answers = run(pool, *(("remote", [how, "b"]) for how in hows))
    assert values(answers[0]) == [0.5, "Abstain"]
    kinds = [answer.failure.kind if isinstance(answer.failure, Failure) else "" for answer in answers[1:]]
    assert kinds == ["transient", "invalid", "invalid", "invalid"]
    request = next(one for one in Server.seen if one["query"][0].endswith("good"))
    assert request == {
        "query": ["system text\n\nWhat?good", "system text\n\nWhat?b"],
        "prompts": ["system text\n\nWhat?"] * 2,
        "labels": ["42", "42"],
    }


def test_a_server_that_asks_to_wait_is_asked_again_when_that_is_over(
    url: str, make_text: Callable[..., TextGroup]
) -> None:
    component = {"url": url, "style": "openrlhf", "deadline_s": 30.0}
    scorer = Scorer(RewardsConfig.model_validate({"components": {"remote": component}}))
    prompt = Prompt("p", ({"role": "user", "content": "What?"},), "2", "remote")
    started = time.monotonic()
    try:
        scored = scorer.score(make_text(("later", "later"), prompt=prompt))
    finally:
        scorer.close()
    assert [type(outcome) for outcome in scored.outcomes] == [RewardValue, Abstained]
    assert time.monotonic() - started >= 1.0


def test_a_server_may_ask_for_an_hour_and_gets_a_minute() -> None:
    assert scorer_wait_s(Answer((Failure("transient", "busy", wait_s=3600.0),), 0.0), 1) == 60.0
    assert 5.0 <= scorer_wait_s(Answer((Failure("transient", "busy", wait_s=5.0),), 0.0), 1) < 6.0
    assert scorer_wait_s(Answer((Failure("transient", "busy"),), 0.0), 1) < 1.0


def test_a_server_that_cannot_be_reached_is_a_transient_failure(pool: ProcessPool) -> None:
    (answer,) = run(pool, ("unreachable", ["a"]))
    assert answer.failure is not None
    assert answer.failure.kind == "transient"


def test_components_with_a_path_or_url_are_brought_others_are_not() -> None:
    components: dict[str, Any] = {
        "math": {},
        "gsm": {"path": "a.py:f", "style": "verl", "low": -1.0},
        "far": {"url": "http://h", "style": "openrlhf"},
    }
    parts = RewardsConfig.model_validate({"components": components}).components
    assert brought(parts) == [
        Foreign("gsm", "verl", "a.py:f", low=-1.0),
        Foreign("far", "openrlhf", url="http://h"),
    ]
