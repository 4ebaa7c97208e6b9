"""`python -m rewards serve`: a real server on a free port, asked, misused, flooded, ended, and used by URL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rewards.foreign import Foreign, endpoint
from rewards.processes import Answer, Call, ProcessPool
from rewards.registry import Abstain, RewardInput, Score

ROOT = Path(__file__).resolve().parents[2]

AUTHOR = """
import time
from rewards import Abstain, Score, TransientRewardError, reward

@reward("mine")
def mine(sample):
    how = sample.final.split()[0] if sample.final else ""
    if how == "slow": time.sleep(0.15)
    if how == "long": time.sleep(0.6)
    if how == "hang": time.sleep(60)
    if how == "raise": raise KeyError("the author's own")
    if how == "again": raise TransientRewardError("busy")
    if how == "abstain": return Abstain("not asked")
    return Score(0.5, sample.messages[-1]["content"], {"part": 0.25})

@reward("share", group=True)
def share(samples): return [1 / len(samples)] * len(samples)
"""


class Server:
    """A served set of rewards, in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "rewards", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        first = next((line for line in self.process.stderr if line.startswith("serving")), "")
        self.url = first.rpartition(" at ")[2].strip()
        assert self.url, "the server did not start"
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as response:
                return response.status, json.loads(response.read()), dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), dict(error.headers)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("author") / "author.py"
    path.write_text(AUTHOR)
    return str(path)


@pytest.fixture(scope="module")
def server(author: str) -> Iterator[Server]:
    server = Server(
        "--rewards", "mine,share,math", "--module", author, "--queue", "20", "--max-body-mib", "1", "--deadline", "2",
        "--params", "math.extraction=boxed", "--retries", "0",
    )  # fmt: skip
    yield server
    assert server.end() == 0


def row(completion: str, answer: str = "42", prompt: Any = "6 x 7?") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "answer": answer}


def rows(*completions: str) -> dict[str, Any]:
    return {"rows": [row(completion) for completion in completions]}


# --- asked ------------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_each_with_its_status(server: Server) -> None:
    status, answer, _ = server.ask("/score/mine", rows("x", "raise", "abstain", "hang", "y"))
    assert status == 200
    results = answer["results"]
    assert [one["status"] for one in results] == ["value", "error", "abstain", "error", "value"]
    assert (results[0]["value"], results[0]["parts"], results[0]["reason"]) == (0.5, {"part": 0.25}, "6 x 7?")
    assert [one["value"] for one in results[1:4]] == [None] * 3
    assert "author.py" in results[1]["error"]["traceback"]
    assert results[3]["error"]["kind"] == "timeout"


def test_the_reward_is_named_in_the_path_or_the_body_and_parameters_are_the_servers(server: Server) -> None:
    body = rows("\\boxed{42}", "it is 42")
    by_path, by_body = server.ask("/score/math", body)[1], server.ask("/score", body | {"reward": "math"})[1]
    assert [one["value"] for one in by_path["results"]] == [one["value"] for one in by_body["results"]] == [1.0, 0.0]


def test_a_group_reward_sees_the_rows_of_a_prompt_together(server: Server) -> None:
    body = {"rows": [row("x", prompt=prompt) for prompt in ("a", "a", "b")]}
    assert [one["value"] for one in server.ask("/score/share", body)[1]["results"]] == [0.5, 0.5, 1.0]


def test_openrlhf_asks_in_its_own_protocol(server: Server) -> None:
    asked = {"query": ["<s>6 x 7?x", "6 x 7?abstain"], "prompts": ["6 x 7?"] * 2, "labels": ["42"] * 2}
    status, answer, _ = server.ask("/get_reward/mine", asked)
    assert (status, answer["rewards"], answer["scores"]) == (200, [0.5, None], [0.5, None])


@pytest.mark.parametrize(("how", "status"), [("raise", 422), ("again", 503)])
def test_an_error_is_never_a_zero_in_openrlhfs_protocol(server: Server, how: str, status: int) -> None:
    asked = {"query": ["?x", f"?{how}"], "prompts": ["?"] * 2, "labels": [""] * 2}
    code, answer, _ = server.ask("/get_reward/mine", asked)
    assert code == status
    assert "rewards" not in answer
    assert answer["problems"][0] == ""
    assert answer["problems"][1]


def test_health_and_metrics_say_how_it_is(server: Server) -> None:
    server.ask("/score/math", rows("metrics", "metrics"))
    code, health, _ = server.ask("/health")
    assert (code, health["status"], health["failed"]) == (200, "ok", 0)
    metrics = server.ask("/metrics")[1]
    assert metrics["reward_service/math/calls"] >= 1
    assert metrics["reward_service/math/latency_p99_s"] > 0
    assert metrics["http/requests"] >= 2
    assert metrics["http/queue"] == 0


# --- misused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
        ("/score/mine", b"{", 400, "the body must be JSON"),
        ("/score/mine", b"[" * 100_000, 400, "the body must be JSON"),
        ("/score/mine", b"\xff\xfe", 400, "the body must be JSON"),
        ("/score/mine", [], 400, "must be a JSON object"),
        ("/score/mine", {}, 400, "rows: must be a list"),
        ("/score/mine", {"rows": []}, 400, "rows: must be a list"),
        ("/score/mine", {"rows": [row("x"), 3]}, 400, "rows[1]: must be an object."),
        ("/score/mine", {"rows": [{"prompt": "?", "completion": 1}]}, 400, "completion = 1: must be text."),
        ("/score/mind", rows("x"), 404, "Did you mean mine?"),
        ("/score", rows("x"), 400, "must be one of math, mine, share"),
        ("/score", rows("x") | {"reward": ["mine"]}, 404, "must be one of"),
        ("/scores", rows("x"), 404, "Not Found"),
        ("/health", {}, 405, "Method Not Allowed"),
        ("/score/mine", rows("x" * (2 << 20)), 413, "Maximum request body size"),
        ("/score/mine", rows(*["x"] * 21), 413, "must be at most 20"),
        ("/get_reward/mine", {"query": "x"}, 400, "query: must be a list of texts"),
        ("/get_reward/mine", {"query": ["x"], "prompts": [], "labels": []}, 400, "must be equally long"),
        ("/get_reward/mine", {"query": ["x"], "prompts": ["y"], "labels": [""]}, 400, "does not hold the prompt"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_what_is_wrong(
    server: Server, path: str, body: Any, status: int, problem: str
) -> None:
    code, answer, _ = server.ask(path, body)
    assert (code, list(answer)) == (status, ["problems"])
    assert problem in " ".join(answer["problems"])
    assert server.ask("/score/mine", rows("x"))[0] == 200


def test_above_the_queue_limit_requests_are_told_when_to_come_back_and_none_is_lost(server: Server) -> None:
    def ask(number: int) -> tuple[int, Any, dict[str, str]]:
        return server.ask("/score/mine", rows(*(f"slow {number} {part}" for part in range(4))))

    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(ask, range(10)))
    codes = Counter(code for code, _, _ in answers)
    assert set(codes) == {200, 429}
    for code, answer, headers in answers:
        if code == 429:
            assert 1 <= int(headers["Retry-After"]) <= 60
            assert "rows wait" in answer["problems"][0]
        else:
            assert [one["status"] for one in answer["results"]] == ["value"] * 4
    assert server.ask("/metrics")[1]["http/queue"] == 0


def test_a_port_that_is_taken_and_an_unknown_reward_end_it_at_the_start(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    for arguments, problem in ((["math", "--port", port], "must be free"), (["maths"], "Did you mean math?")):
        command = [sys.executable, "-m", "rewards", "serve", "--rewards", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert problem in done.stderr
        assert "Traceback" not in done.stderr


def test_on_sigterm_it_answers_what_is_in_flight_and_leaves_no_process(author: str) -> None:
    server = Server("--rewards", "mine", "--module", author)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.ask, "/score", rows("long"))
        while server.ask("/metrics")[1]["http/queue"] == 0:
            assert not answer.done()
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert server.end() == 0
        assert answer.result()[1]["results"][0]["status"] == "value"
    assert not any(_alive(int(pid)) for pid in children)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- used by URL ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(server: Server) -> Iterator[ProcessPool]:
    """One pool whose rewards are asked of the server, each by a URL of another kind."""
    urls = {
        "mine": server.url,
        "math": f"{server.url}/",
        "whole": f"{server.url}/score/share",
        "unknown": f"{server.url}/score/none",
        "unreachable": "http://127.0.0.1:9",
        "other protocol": f"{server.url}/get_reward/mine",
    }
    pool = ProcessPool(1, 1 << 29, foreign=[Foreign(name, "groupwise", url=url) for name, url in urls.items()])
    yield pool
    pool.close()


def judged(pool: ProcessPool, name: str, *completions: str, deadline_s: float = 20.0) -> Answer:
    messages = ({"role": "user", "content": "6 x 7?"},)
    seen = tuple(RewardInput.of(text, "42", messages=messages, metadata={"k": [1]}) for text in completions)
    return pool.answers([Call(name, seen, {}, deadline_s)])[0]


def test_values_abstentions_and_errors_are_by_url_what_they_are_here(pool: ProcessPool) -> None:
    answer = judged(pool, "mine", "x", "abstain", "raise", "again")
    value, abstained, raised, transient = answer.verdicts
    assert value == Score(0.5, "6 x 7?", {"part": 0.25})
    assert abstained == Abstain("not asked")
    assert not isinstance(raised, Score | Abstain)
    assert (raised.kind, raised.transient) == ("raised", False)
    assert "author.py" in raised.traceback
    assert not isinstance(transient, Score | Abstain)
    assert transient.transient


def test_a_served_reward_may_stand_in_for_the_one_of_its_name(pool: ProcessPool) -> None:
    answer = judged(pool, "math", "\\boxed{42}", "it is 42")
    assert [verdict.value for verdict in answer.verdicts if isinstance(verdict, Score)] == [1.0, 0.0]


def test_a_url_with_a_path_is_taken_as_it_is(pool: ProcessPool) -> None:
    assert endpoint("http://h:1", "math") == endpoint("http://h:1/", "math") == "http://h:1/score/math"
    assert endpoint("https://h/v1/score/other", "math") == "https://h/v1/score/other"
    answer = judged(pool, "whole", "x", "y")
    assert [verdict.value for verdict in answer.verdicts if isinstance(verdict, Score)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("unknown", "invalid", "404"),
        ("unreachable", "transient", "cannot be reached"),
        ("other protocol", "invalid", "400"),
    ],
)
def test_only_what_may_pass_is_transient(pool: ProcessPool, name: str, kind: str, message: str) -> None:
    failure = judged(pool, name, "x").failure
    assert failure is not None
    assert failure.kind == kind
    assert message in failure.message


def test_the_deadline_of_the_component_ends_the_wait(pool: ProcessPool) -> None:
    started = time.monotonic()
    failure = judged(pool, "mine", "hang", deadline_s=0.3).failure
    assert failure is not None
    assert failure.kind == "timeout"
    assert time.monotonic() - started < 5
