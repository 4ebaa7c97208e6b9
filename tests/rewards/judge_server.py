"""A real HTTP server with /v1/chat/completions whose model is a rule, and which can misbehave on the wire."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rewards.judge import judge, judge_pairwise
from rewards.registry import Abstain, RewardInput, Score

Request = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What goes over the wire. `cut_at`: the connection is closed after so many bytes of the body."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_at: int | None = None


Rule = Callable[[Request], Answer]


@dataclass
class JudgeServer:
    url: str
    rule: Rule
    requests: list[Request] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def endpoint(self, **more: Any) -> dict[str, Any]:
        # Verdicts are remembered by model: each server has its own.
        defaults = {
            "base_url": self.url,
            "model": f"rule-{id(self)}-{self.url[-9:-3]}",
            "backoff_s": 0.01,
            "deadline_s": 20.0,
            "attempt_s": 10.0,
        }
        return {**defaults, **more}


@contextmanager
def serving(rule: Rule) -> Iterator[JudgeServer]:
    server = JudgeServer("", rule)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else the body of each answer waits 40 ms for an acknowledgement

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(request)
                server.authorizations.append(self.headers.get("Authorization"))
                server.paths.append(self.path)
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            try:
                self.answer(server.rule(request))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with server.lock:
                    server.in_flight -= 1

        def answer(self, answer: Answer) -> None:
            time.sleep(answer.delay_s)
            if answer.cut_at == 0:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body[: answer.cut_at])
            self.close_connection = answer.cut_at is not None

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


# --- a model that follows the prompt ----------------------------------------------------------------------------------


def texts_in(request: Request) -> dict[str, str]:
    """What the prompt fences in, read with the fence that the system message names."""
    system, user = (message["content"] for message in request["messages"])
    fence = re.search(r"\[BEGIN (\w+) \.\.\.\]", system).group(1)  # type: ignore[union-attr]
    found = re.findall(rf"\[BEGIN {fence} (\w+)\]\n(.*?)\n\[END {fence} \1\]", user, re.DOTALL)
    return dict(found)


def check_word(request: Request) -> str:
    user = request["messages"][1]["content"]
    found = re.findall(r'"check": "(\w+)"|^[A-Z_]+ (\w{12}): \.\.\.$', user, re.MULTILINE)
    return "".join(found[-1])


def is_structured(request: Request) -> bool:
    return "response_format" in request


def says(request: Request, **fields: Any) -> str:
    """A reply in the form that was asked for."""
    check = check_word(request)
    if is_structured(request):
        return json.dumps({"check": check, **fields})
    return "\n".join(f"{name.upper()} {check}: {value}" for name, value in fields.items())


def completion(content: Any, *, finish: str | None = "stop", logprobs: Any = None, tokens: int | None = 7) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    if logprobs is not None:
        choice["logprobs"] = {"content": logprobs}
    usage = {} if tokens is None else {"usage": {"total_tokens": tokens}}
    return Answer(json.dumps({"object": "chat.completion", "choices": [choice], **usage}).encode())


def compares(request: Request) -> Answer:
    """Right when the answer is the reference, letter by letter; the longer of two responses is the better one."""
    texts = texts_in(request)
    if "first" in texts:
        sizes = len(texts["first"]), len(texts["second"])
        winner = "tie" if sizes[0] == sizes[1] else ("first", "second")[sizes[1] > sizes[0]]
        return completion(says(request, winner=winner))
    return completion(says(request, verdict="correct" if texts["candidate"] == texts["reference"] else "incorrect"))


# --- asking -----------------------------------------------------------------------------------------------------------

QUIET = {"rate": 0.0}


def sample(text: str, answer: str = "Paris", **more: Any) -> RewardInput:
    return RewardInput.of(
        text, answer, messages=({"role": "user", "content": "What is the capital of France?"},), **more
    )


def ask(server: JudgeServer, one: RewardInput | str, endpoint: dict[str, Any] | None = None, **params: Any) -> Score:
    """The judge's score, without canaries unless they are asked for."""
    seen = sample(one) if isinstance(one, str) else one
    given = {"endpoint": server.endpoint(**(endpoint or {})), "canaries": QUIET, **params}
    return asyncio.run(judge(seen, **given))


def ask_many(
    server: JudgeServer, texts: list[str], endpoint: dict[str, Any] | None = None, **params: Any
) -> list[Score | BaseException]:
    """Scores and errors of samples judged side by side."""
    given = {"endpoint": server.endpoint(**(endpoint or {})), "canaries": QUIET, **params}

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(judge(sample(text), **given) for text in texts), return_exceptions=True)

    return asyncio.run(all_of_them())


def rank(server: JudgeServer, texts: list[str], **params: Any) -> list[Score | Abstain]:
    given = {"endpoint": server.endpoint(), "canaries": QUIET, **params}
    return asyncio.run(judge_pairwise([sample(text) for text in texts], **given))
