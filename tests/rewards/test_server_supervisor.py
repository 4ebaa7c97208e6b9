"""Model servers of the run's own: a real process that is waited for, started again, given up, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.servers.command import command, environment, located
from rewards.servers.guard import RequireKey
from rewards.servers.supervisor import Served, Supervisor, held_port, log_tail
from rlhf.config import ServerConfig
from rlhf.errors import DeadlineError, WorkerLostError

ROOT = Path(__file__).resolve().parents[2]

# Writes its process id to a file at each start, has a child of its own, and does what a file beside it says.
PROGRAM = """
import http.server, os, pathlib, subprocess, sys, time
folder, host, port = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
with (folder / "pids").open("a") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
print("the server's own last words", flush=True)
if (folder / "refuse").exists():
    sys.exit(3)
if (folder / "hang").exists():
    time.sleep(600)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass

http.server.HTTPServer((host, port), Handler).serve_forever()
"""

Serve = Callable[..., Supervisor]


def served(folder: Path, port: int, **more: Any) -> Served:
    (folder / "program.py").write_text(PROGRAM)
    fields: dict[str, Any] = {
        "name": "judge",
        "command": [sys.executable, "-S", str(folder / "program.py"), str(folder), "127.0.0.1", str(port)],
        "environment": dict(os.environ),
        "health_url": f"http://127.0.0.1:{port}/health",
        "log": folder / "logs" / "server-judge.log",
        "start_deadline_s": 60.0,
        "max_restarts": 2,
    }
    return Served(**{**fields, **more})


@pytest.fixture
def port() -> Iterator[int]:
    holder, port = held_port("127.0.0.1")
    yield port
    holder.close()


@pytest.fixture
def serve(tmp_path: Path, port: int) -> Iterator[Serve]:
    started: list[Supervisor] = []

    def start(**more: Any) -> Supervisor:
        started.append(Supervisor(served(tmp_path, port, **more)))
        return started[-1]

    yield start
    for one in started:
        one.close()


def pids(folder: Path) -> list[tuple[int, int]]:
    """(server, its child) of every start so far."""
    path = folder / "pids"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60.0
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_answered(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


# --- its life ---------------------------------------------------------------------------------------------------------


def test_a_healthy_server_is_answered_and_ends_with_all_its_processes(serve: Serve, tmp_path: Path, port: int) -> None:
    supervisor = serve()
    supervisor.wait_until_healthy()
    ((server, child),) = pids(tmp_path)
    assert is_answered(port) and supervisor.up and supervisor.pid == server and supervisor.restarts == 0
    supervisor.close()
    assert not alive(server) and not alive(child) and not supervisor.up
    assert not is_answered(port)
    assert "last words" in (tmp_path / "logs" / "server-judge.log").read_text()


def test_a_server_that_ends_is_started_again_at_the_same_port(serve: Serve, tmp_path: Path, port: int) -> None:
    supervisor = serve()
    supervisor.wait_until_healthy()
    (first, child), *_ = pids(tmp_path)
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.restarts == 1 and supervisor.up, "it was not started again")
    assert is_answered(port)
    assert not alive(child), "what the first one started outlives it"
    assert [alive(server) for server, _ in pids(tmp_path)] == [False, True]
    supervisor.check()
    assert "server judge ended: signal 9. Restart 1 of 2." in (tmp_path / "logs" / "server-judge.log").read_text()


def test_a_server_that_keeps_ending_is_given_up_with_the_end_of_its_log(serve: Serve, tmp_path: Path) -> None:
    supervisor = serve(max_restarts=2)
    supervisor.wait_until_healthy()
    (tmp_path / "refuse").touch()
    os.kill(pids(tmp_path)[0][0], signal.SIGKILL)

    def given_up() -> bool:
        try:
            supervisor.check()
        except WorkerLostError:
            return True
        return False

    until(given_up, "it was never given up")
    assert len(pids(tmp_path)) == 3 and supervisor.restarts == 2
    with pytest.raises(WorkerLostError) as error:
        supervisor.check()
    assert "ended: exit code 3" in str(error.value)
    assert "after 2 of servers.judge.max_restarts" in str(error.value)
    assert "the server's own last words" in str(error.value)


def test_a_server_that_never_comes_up_is_not_tried_again(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with pytest.raises(WorkerLostError, match=r"(?s)exit code 3.*the server's own last words"):
        serve().wait_until_healthy()
    assert len(pids(tmp_path)) == 1


def test_a_command_that_does_not_exist_is_an_error_and_no_wait(serve: Serve) -> None:
    with pytest.raises(WorkerLostError, match=r"(?s)exit code 1.*no-such-program"):
        serve(command=["no-such-program"]).wait_until_healthy()


def test_a_server_that_is_not_healthy_in_time_is_ended(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "hang").touch()
    supervisor = serve(start_deadline_s=1.5)
    with pytest.raises(DeadlineError, match=r"(?s)start_deadline_s = 1\.5 s.*last words"):
        supervisor.wait_until_healthy()
    assert not any(alive(pid) for pair in pids(tmp_path) for pid in pair)


def test_it_can_be_closed_while_it_starts(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "hang").touch()
    supervisor = serve()
    until(lambda: bool(pids(tmp_path)), "it did not start")
    supervisor.close()
    assert not any(alive(pid) for pair in pids(tmp_path) for pid in pair)


OWNER = """
import sys, time
from pathlib import Path
from rewards.servers.supervisor import Supervisor
from tests.rewards.test_server_supervisor import served
supervisor = Supervisor(served(Path(sys.argv[1]), int(sys.argv[2])))
supervisor.wait_until_healthy()
print("up", flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_owner_however_that_ends(tmp_path: Path, port: int) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "up\n"
        ((server, child),) = pids(tmp_path)
        assert alive(server) and alive(child)
    finally:
        owner.kill()
        owner.communicate()
    until(lambda: not alive(server) and not alive(child), "the server outlives its owner")


def test_the_end_of_a_log_has_the_error_that_much_was_said_after(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("start\nValueError: this is why\n" + "leaked\n" * 500)
    tail = log_tail(log)
    assert tail[:2] == ["ValueError: this is why", "..."] and tail[2:] == ["leaked"] * 20
    log.write_text("a\nb\n")
    assert log_tail(log) == ["a", "b"]


def test_a_held_port_is_nobody_elses(port: int) -> None:
    others = []
    for _ in range(200):
        other = socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        others.append(other)
    assert port not in {other.getsockname()[1] for other in others}
    for other in others:
        other.close()


# --- its command line -------------------------------------------------------------------------------------------------


def flags(device: str = "cpu", **fields: Any) -> str:
    server = ServerConfig.model_validate({"kind": "chat", "model": "org/name", **fields})
    return " ".join(command(server, device, "10.0.0.1", 8123))


def test_the_command_line_says_what_the_config_says() -> None:
    line = flags(dtype="bfloat16", max_context_tokens=512, max_concurrent_requests=7, chat_template="t.jinja")
    for part in (
        "--model org/name", "--served-model-name org/name", "--host 10.0.0.1", "--port 8123", "--dtype bfloat16",
        "--max-model-len 512", "--max-num-seqs 7", "--chat-template t.jinja", "--enforce-eager",
        "--distributed-executor-backend uni",
    ):  # fmt: skip
        assert part in line
    assert "runner" not in line and "trust-remote-code" not in line and "gpu-memory" not in line


def test_a_reward_model_is_served_as_a_classifier_and_a_gpu_is_used_as_asked() -> None:
    line = flags("cuda", kind="reward_model", tensor_parallel_size=2, trust_remote_code=True)
    for part in (
        "--runner pooling", "--convert classify", "--tensor-parallel-size 2", "--distributed-executor-backend mp",
        "--gpu-memory-utilization 0.9", "--trust-remote-code",
    ):  # fmt: skip
        assert part in line
    assert "--enforce-eager" not in line


def test_more_flags_are_passed_on_in_every_form() -> None:
    more = {"quantization": "fp8", "enable_prefix_caching": False, "async-scheduling": True, "swap-space": None,
            "allowed-origins": ["a", "b"], "limit-mm-per-prompt": {"image": 1}, "enforce-eager": False}  # fmt: skip
    line = flags(args=more)
    assert "--quantization fp8 --no-enable-prefix-caching --async-scheduling --allowed-origins a b" in line
    assert '--limit-mm-per-prompt {"image": 1}' in line
    assert "--no-enforce-eager" in line and "--enforce-eager" not in line.replace("--no-enforce-eager", "")
    assert "swap-space" not in line


def test_the_key_is_in_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # an engine in this process sets it
    server = ServerConfig(kind="chat", model="m", kv_cache_gib=3)
    given = environment(server, "cpu", "secret-key")
    assert given["VLLM_API_KEY"] == "secret-key" and given["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert given["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(server, "cuda", "secret-key")
    assert "secret-key" not in " ".join(command(server, "cpu", "h", 1))


def test_local_paths_are_made_absolute_and_hub_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    found = located(ServerConfig(kind="chat", model="model", chat_template="missing.jinja"))
    assert (found.model, found.chat_template) == (str(tmp_path / "model"), "missing.jinja")
    assert located(ServerConfig(kind="chat", model="org/name")).model == "org/name"


# --- who is answered --------------------------------------------------------------------------------------------------


def asked(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> list[dict[str, Any]]:
    """What the server sends back."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "answered"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {}

    asyncio.run(RequireKey(app)({"type": kind, "path": path, "headers": list(headers)}, receive, send))
    return sent


def test_nobody_without_the_key_is_answered_but_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "right")
    right, answered = (b"authorization", b"Bearer right"), [{"type": "answered"}]
    for path in ("/v1/chat/completions", "/classify", "/tokenize", "/metrics", "/health/more", "/"):
        assert asked(path)[0]["status"] == 401
        assert asked(path, (b"authorization", b"Bearer wrong"))[0]["status"] == 401
        assert asked(path, (b"authorization", "Bearer ключ".encode()))[0]["status"] == 401
        assert asked(path, right) == answered
    assert asked("/health") == answered and asked("", kind="lifespan") == answered
    assert asked("/v1/realtime", kind="websocket")[0] == {"type": "websocket.close", "code": 1008}
    assert b"right" not in asked("/classify")[1]["body"]
