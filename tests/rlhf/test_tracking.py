"""The JSON lines are the record; W&B runs offline beside them, in the run directory, and may fail without harm."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config import TrackingConfig
from rlhf.errors import NonFiniteError
from rlhf.samples import (
    Abstained,
    GroupTokens,
    InMemory,
    Prompt,
    RewardFailed,
    RewardValue,
    Sample,
    SampleGroup,
    ScoredGroup,
    TextGroup,
    TextSample,
    VersionSpan,
)
from rlhf.tracking import SAMPLE_COLUMNS, Tracker, sample_rows


def config(mode: str = "disabled") -> TrackingConfig:
    return TrackingConfig.model_validate({"wandb": {"mode": mode}})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored_group() -> ScoredGroup:
    prompt = Prompt("p", ({"role": "user", "content": "2+2?"},), "4", "math")
    spans = ((VersionSpan(3, 0, 2),), (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)), (VersionSpan(4, 0, 2),))
    samples = tuple(Sample(f"s{i}", 1, 2, span, "stop") for i, span in enumerate(spans))
    texts = tuple(TextSample(f"s{i}", "4 \ud800", 2, False) for i in range(3))
    tokens = GroupTokens(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32), np.zeros(1, np.int64))
    stored = InMemory(tokens, TextGroup("g1", prompt, False, 3, texts))
    outcomes = (
        RewardValue(0.9, 1.0, {"math": 1.0}, "equal"),
        Abstained("math", "no box"),
        RewardFailed("judge", "timeout", "Traceback", 2),
    )
    return ScoredGroup(SampleGroup("g1", prompt, False, samples, 0.1, stored), outcomes, 0.01)


def test_a_metric_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    tracker = Tracker(config(), tmp_path, {}, "abc")
    tracker.log({"reward/mean": np.float32(0.5), "rollout/groups": 64}, stage="rl", step=3)
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line.pop("time_s") > 1e9
    assert line == {"stage": "rl", "step": 3, "reward/mean": 0.5, "rollout/groups": 64}
    tracker.close(ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    tracker = Tracker(config(), tmp_path, {}, "abc")
    with pytest.raises(NonFiniteError, match=r"policy/loss = -?(nan|inf) in stage rl, step 7"):
        tracker.log({"policy/loss": value}, stage="rl", step=7)
    assert not lines(tmp_path / "metrics.jsonl")


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for step in range(2):
        tracker = Tracker(config(), tmp_path, {}, "abc")
        tracker.log({"a": 1}, stage="rl", step=step)
        tracker.close(ok=True)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_sample_rows_tell_values_abstentions_and_failures_apart() -> None:
    valued, abstained, failed = sample_rows(scored_group(), [0.5, 0.0, 0.0], "trained", correct_at=1.0)
    assert set(valued) == set(SAMPLE_COLUMNS)
    assert (valued["prompt"], valued["reward"], valued["parts"]) == ("user: 2+2?", 0.9, {"math": 1.0})
    assert (valued["correct"], valued["advantage"], valued["note"]) == (True, 0.5, "equal")
    assert (abstained["reward"], abstained["correct"], abstained["note"]) == (None, None, "math abstained: no box")
    assert failed["note"] == "judge failed 2 times: timeout"


def test_sample_rows_name_the_weight_versions_of_a_completion() -> None:
    rows = sample_rows(scored_group(), None, "filtered/all_wrong", correct_at=1.0)
    assert [row["versions"] for row in rows] == ["3", "3 to token 1, 4 to token 2", "4"]
    assert {row["advantage"] for row in rows} == {None}


def test_samples_round_trip_even_with_text_that_is_not_unicode(tmp_path: Path) -> None:
    tracker = Tracker(config(), tmp_path, {}, "abc")
    rows = sample_rows(scored_group(), None, "trained", correct_at=1.0)
    tracker.log_samples(rows, stage="rl", step=2)
    assert lines(tmp_path / "samples.jsonl") == [{"stage": "rl", "step": 2, **row} for row in rows]


def test_a_row_with_other_columns_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="wrong keys"):
        Tracker(config(), tmp_path, {}, "abc").log_samples([{"prompt": "x"}], stage="rl", step=0)


def test_disabled_wandb_is_not_even_imported(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from rlhf.config import TrackingConfig
        from rlhf.tracking import Tracker
        config = TrackingConfig.model_validate({"wandb": {"mode": "disabled"}})
        tracker = Tracker(config, Path("run"), {}, "v")
        tracker.log({"a": 1}, stage="rl", step=0)
        tracker.close(ok=True)
        assert "wandb" not in sys.modules
    """
    run_python(code, tmp_path)


OFFLINE_RUN = """
    import os, time
    from pathlib import Path
    from rlhf.config import TrackingConfig
    from rlhf.tracking import SAMPLE_COLUMNS, Tracker
    tracker = Tracker(TrackingConfig(), Path("run"), {"seed": 3}, "abc")
    for stage in ("sft", "rl"):
        for step in range(3):
            tracker.log({"policy/loss": 1.0 / (step + 1)}, stage=stage, step=step)
    row = dict.fromkeys(SAMPLE_COLUMNS, "x")
    row |= {"reward": 0.5, "parts": {"math": 1.0}, "correct": True, "advantage": None}
    tracker.log_samples([row], stage="rl", step=2)
    tracker.summary({"pass@1": 0.5})
    tracker.close(ok=True)
    assert tracker.wandb_lost_calls == 0
    assert not [name for name in os.environ if name.startswith("WANDB_") and "run" in os.environ[name]]
    parents = [Path("/proc", pid, "stat") for pid in os.listdir("/proc") if pid.isdigit()]
    mine = [p for p in parents if p.exists() and p.read_text().rpartition(")")[2].split()[1] == str(os.getpid())]
    assert not mine, "a process is left"
"""


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own with an empty home, no terminal and no W&B settings."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**clean, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("offline")
    return folder, run_python(OFFLINE_RUN, folder)


def records(folder: Path) -> list[Any]:
    """The protocol records of the one offline run below `folder`.

    The file is a LevelDB log after a 7-byte header: blocks of 32 KiB, chunks of crc (4 bytes), length (2), type (1),
    where type 1 is a whole record and 2, 3, 4 are the first, a middle and the last part of one.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run/wandb/offline-run-*/*.wandb")
    data, found, part, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(part))
            part = b""
    return found


def test_each_stage_has_its_own_axis_and_the_global_step_only_grows(offline: tuple[Path, Any]) -> None:
    found = records(offline[0])
    axes = {r.metric.glob_name: r.metric.step_metric for r in found if r.WhichOneof("record_type") == "metric"}
    assert (axes["sft/*"], axes["rl/*"]) == ("sft/step", "rl/step")
    history = [r.history for r in found if r.WhichOneof("record_type") == "history"]
    steps = [row.step.num for row in history]
    assert steps == sorted(set(steps))
    items = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in history]
    assert [row["rl/step"] for row in items if "rl/policy/loss" in row] == [0, 1, 2]
    assert [row["sft/step"] for row in items if "sft/policy/loss" in row] == [0, 1, 2]


def test_the_run_config_and_code_version_reach_wandb(offline: tuple[Path, Any]) -> None:
    (run,) = [r.run for r in records(offline[0]) if r.WhichOneof("record_type") == "run"]
    sent = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (sent["seed"], sent["code_version"]) == (3, "abc")


class BrokenRun:
    """Fails as a W&B run does whose service process was killed."""

    def define_metric(self, *_: object, **__: object) -> None:
        raise BrokenPipeError("service gone")


def test_a_failing_wandb_is_reported_once_counted_and_does_not_stop_the_run(tmp_path: Path) -> None:
    reports: list[str] = []
    tracker = Tracker(config(), tmp_path, {}, "abc", report=reports.append)
    tracker._wandb._run = BrokenRun()
    for step in range(3):
        tracker.log({"a": 1}, stage="rl", step=step)
    assert len(lines(tmp_path / "metrics.jsonl")) == 3
    assert tracker.wandb_lost_calls == 3
    assert len(reports) == 1
    assert "BrokenPipeError: service gone" in reports[0]
    tracker.close(ok=False)
    assert "did not get 3 calls" in reports[1]


def test_online_without_a_key_is_reported_and_never_asks(tmp_path: Path) -> None:
    code = """
        from pathlib import Path
        from rlhf.config import TrackingConfig
        from rlhf.tracking import Tracker
        tracker = Tracker(TrackingConfig.model_validate({"wandb": {"mode": "online"}}), Path("run"), {}, "v")
        tracker.log({"a": 1}, stage="rl", step=0)
        tracker.close(ok=True)
        assert tracker.wandb_lost_calls == 2
    """
    done = run_python(code, tmp_path)
    assert "no API key" in done.stderr
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
