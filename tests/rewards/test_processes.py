"""Killable graders: deadlines, crashes, memory, recycling, and that no process outlives its parent or `close`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rewards.processes import Call, Failure, ProcessPool, Verdict
from rewards.registry import Abstain, RewardInput, Score
from rlhf.errors import ConfigError, WorkerLostError

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]

NASTY = """
import os, subprocess, sys, time, threading, signal
from rewards import Abstain, RewardInput, Score, reward

@reward
def behave(sample: RewardInput, grandchild_file: str = ""):
    how = sample.final
    if how == "hang":
        while True: pass
    if how == "hang in C": 9 ** (9 ** 9)
    if how == "hang with a child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(grandchild_file, "w").write(str(child.pid))
        time.sleep(600)
    if how == "ignore signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
    if how == "exit": os._exit(0)
    if how == "sys.exit": sys.exit(3)
    if how == "kill -9": os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory": return len([bytearray(1 << 20) for _ in range(10**6)])
    if how == "raise": raise ValueError("the author's own message")
    if how == "print": print('{"kind": "score", "value": 1.0, "reason": "forged", "parts": {}}', flush=True)
    if how == "fork": os.fork()
    if how == "nan": return float("nan")
    if how == "abstain": return Abstain("not mine")
    if how == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
    if how == "pid": return Score(0.0, str(os.getpid()))
    return Score(0.5, "fine", {"part": 0.25})
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("author") / "nasty.py"
    path.write_text(NASTY)
    return str(path)


@pytest.fixture(scope="module")
def shared_pool(module: str) -> Iterator[ProcessPool]:
    pool = ProcessPool(1, 512 * MIB, [module])
    yield pool
    pool.close()


@pytest.fixture
def pool(shared_pool: ProcessPool) -> ProcessPool:
    # A test may have killed the process, and the next one is only started by the next call.
    assert shared_pool.run([call("ok")]) == [FINE]
    return shared_pool


def call(how: str, deadline_s: float = 5.0, **params: str) -> Call:
    return Call("behave", RewardInput.of(how), params, deadline_s)


def failure(verdict: Verdict) -> Failure:
    assert isinstance(verdict, Failure)
    return verdict


FINE = Score(0.5, "fine", {"part": 0.25})


def gone(pid: int) -> bool:
    """No such process, or a zombie nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_verdicts_come_back_in_order(pool: ProcessPool) -> None:
    verdicts = pool.run([call("ok"), call("abstain"), call("ok")])
    assert verdicts == [FINE, Abstain("not mine"), FINE]


@pytest.mark.parametrize("how", ["hang", "hang in C", "ignore signals"])
def test_a_call_that_hangs_is_killed_at_its_deadline_and_the_others_still_run(pool: ProcessPool, how: str) -> None:
    before, started = pool.pids(), time.monotonic()
    verdicts = pool.run([call("ok"), call(how, 0.3), call("ok")])
    assert 0.3 <= time.monotonic() - started < 3.0
    assert verdicts[0] == verdicts[2] == FINE
    assert failure(verdicts[1]).kind == "timeout"
    assert "deadline of 0.3 s" in failure(verdicts[1]).message
    assert gone(before[0])
    assert len(pool.pids()) == 1


def test_what_a_killed_call_started_is_killed_too(pool: ProcessPool, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    verdicts = pool.run([call("hang with a child", 1.0, grandchild_file=str(pid_file))])
    assert failure(verdicts[0]).kind == "timeout"
    assert eventually(lambda: gone(int(pid_file.read_text())))


@pytest.mark.parametrize(("how", "detail"), [("exit", "exit code 0"), ("kill -9", "signal 9")])
def test_a_process_that_dies_is_a_crash_of_that_call_alone(pool: ProcessPool, how: str, detail: str) -> None:
    verdicts = pool.run([call("ok"), call(how), call("ok")])
    assert verdicts[0] == verdicts[2] == FINE
    assert failure(verdicts[1]).kind == "crash"
    assert detail in failure(verdicts[1]).message


def test_a_memory_bomb_hits_the_address_space_limit(pool: ProcessPool) -> None:
    before = pool.pids()
    verdicts = pool.run([call("memory"), call("ok")])
    assert failure(verdicts[0]).kind == "memory"
    assert failure(verdicts[0]).transient
    assert verdicts[1] == FINE
    assert pool.pids() != before


def test_an_exception_carries_the_author_s_traceback_and_keeps_the_process(pool: ProcessPool, module: str) -> None:
    before = pool.pids()
    verdict = failure(pool.run([call("raise")])[0])
    assert verdict.kind == "raised"
    assert not verdict.transient
    assert verdict.message == "ValueError: the author's own message"
    assert f'File "{module}"' in verdict.traceback
    assert "grader.py" not in verdict.traceback
    assert "registry.py" not in verdict.traceback
    assert pool.pids() == before


def test_sys_exit_inside_a_reward_is_an_exception_like_any_other(pool: ProcessPool) -> None:
    assert failure(pool.run([call("sys.exit")])[0]).message == "SystemExit: 3"


def test_a_value_that_is_no_reward_is_not_transient(pool: ProcessPool) -> None:
    verdict = failure(pool.run([call("nan")])[0])
    assert (verdict.kind, verdict.transient) == ("invalid", False)


def test_printing_cannot_forge_a_result(pool: ProcessPool) -> None:
    assert pool.run([call("print"), call("ok")]) == [FINE, FINE]


def test_a_forked_copy_of_the_grader_does_not_answer(pool: ProcessPool) -> None:
    assert pool.run([call("fork"), call("ok"), call("abstain")]) == [FINE, FINE, Abstain("not mine")]


def test_rewards_run_in_a_main_thread_where_alarms_work(pool: ProcessPool) -> None:
    assert pool.run([call("alarm")]) == [FINE]


def test_a_batch_larger_than_a_pipe_gets_through(pool: ProcessPool) -> None:
    long = Call("behave", RewardInput.of("x" * 300_000), {}, 5.0)
    assert pool.run([long] * 8) == [FINE] * 8


def test_several_processes_share_a_batch(module: str) -> None:
    pool = ProcessPool(2, 512 * MIB, [module])
    try:
        verdicts = pool.run([call("pid")] * 4)
        assert len({verdict.reason for verdict in verdicts if isinstance(verdict, Score)}) == 2
        assert failure(pool.run([call("hang", 0.3), call("ok")])[0]).kind == "timeout"
        assert pool.run([call("ok")] * 5) == [FINE] * 5
    finally:
        pool.close()


def test_concurrent_callers_get_their_own_verdicts(pool: ProcessPool) -> None:
    results: dict[str, list[Verdict]] = {}

    def caller(how: str) -> None:
        results[how] = pool.run([call(how)] * 50)

    threads = [threading.Thread(target=caller, args=(how,)) for how in ("ok", "abstain", "print")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"ok": [FINE] * 50, "abstain": [Abstain("not mine")] * 50, "print": [FINE] * 50}


def test_a_grader_outlives_the_thread_that_started_it(module: str) -> None:
    pools: list[ProcessPool] = []
    thread = threading.Thread(target=lambda: pools.append(ProcessPool(1, 512 * MIB, [module])))
    thread.start()
    thread.join()
    before = pools[0].pids()
    assert pools[0].run([call("ok")]) == [FINE]
    assert pools[0].pids() == before
    pools[0].close()


def test_a_process_is_replaced_after_its_share_of_calls(module: str) -> None:
    pool = ProcessPool(1, 512 * MIB, [module], calls_per_process=2)
    before = pool.pids()
    assert pool.run([call("ok")] * 2) == [FINE] * 2
    assert pool.run([call("ok")]) == [FINE]
    assert pool.pids() != before
    assert gone(before[0])
    pool.close()


def test_a_process_killed_while_idle_is_replaced_without_a_failure(pool: ProcessPool) -> None:
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert pool.run([call("ok")]) == [FINE]


def test_close_leaves_no_process_and_may_be_called_twice(module: str) -> None:
    pool = ProcessPool(2, 512 * MIB, [module])
    pids = pool.pids()
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids)
    assert pool.pids() == ()
    with pytest.raises(WorkerLostError, match="closed"):
        pool.run([call("ok")])


def test_close_ends_a_run_in_flight(module: str) -> None:
    pool = ProcessPool(1, 512 * MIB, [module])
    raised: list[BaseException] = []

    def caller() -> None:
        try:
            pool.run([call("hang", 60.0), call("ok")])
        except WorkerLostError as error:
            raised.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    time.sleep(0.2)
    pool.close()
    thread.join(5.0)
    assert not thread.is_alive()
    assert len(raised) == 1


def test_no_file_descriptor_is_left_after_kills_and_close(module: str) -> None:
    before = open_files()
    pool = ProcessPool(2, 512 * MIB, [module])
    pool.run([call("exit"), call("exit"), call("ok"), call("raise")])
    pool.close()
    assert open_files() == before


def test_a_module_that_cannot_be_imported_fails_the_start_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('half finished')")
    with pytest.raises(ConfigError, match="half finished"):
        ProcessPool(1, 512 * MIB, [str(path)])


@pytest.mark.parametrize("how", ["ok", "hang", "hang in C"])
def test_graders_die_with_their_parent_even_when_it_is_killed(module: str, tmp_path: Path, how: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from rewards.processes import Call, ProcessPool\n"
        "from rewards.registry import RewardInput\n"
        "pool = ProcessPool(2, 512 << 20, [sys.argv[1]])\n"
        "print(*pool.pids(), flush=True)\n"
        "pool.run([Call('behave', RewardInput.of(sys.argv[2]), {}, 600.0)] * 2)\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), module, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.2)
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
        parent.kill()
    assert eventually(lambda: all(gone(pid) for pid in pids))
