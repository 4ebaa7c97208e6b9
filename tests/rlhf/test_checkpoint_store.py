"""Checkpoints on disk: whole or not at all, also when the process dies at any moment of a write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.checkpoints.store import MANIFEST, Checkpoint, CheckpointStore, read_checkpoint
from rlhf.errors import CheckpointError

WRITER = """
import os, sys
from pathlib import Path
from rlhf.checkpoints import directories, store

root, wanted, calls = Path(sys.argv[1]), int(sys.argv[2]), 0

def dying(inner):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == wanted:
            os._exit(9)
        return inner(*arguments, **keywords)
    return call

for module, name in ((directories, "sync"), (store, "sync"), (directories, "_replace"), (store.shutil, "rmtree")):
    setattr(module, name, dying(getattr(module, name)))
store.json.dumps = dying(store.json.dumps)
kept = store.CheckpointStore(root, keep=1)
kept.write("rl-000002", {"step": 2}, 0, lambda folder: (folder / "weights").write_bytes(b"two" * 1000))
print(calls)
"""


def write(store: CheckpointStore, step: int, content: bytes | None = None) -> Checkpoint:
    def fill(folder: Path) -> None:
        (folder / "learner").mkdir()
        (folder / "learner" / "weights").write_bytes(content or bytes([step]) * 1000)

    return store.write(f"rl-{step:06d}", {"step": step}, 0, fill)


def no_report(text: str) -> None:
    raise AssertionError(text)


def newest_step(root: Path) -> int:
    found = CheckpointStore(root, keep=2).newest(no_report)
    assert found is not None
    step: int = found.state["step"]
    return step


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, keep=2).newest(no_report) is None
    written = write(CheckpointStore(tmp_path, keep=2), 1)
    found = CheckpointStore(tmp_path, keep=2).newest(no_report)
    assert found == written
    assert found.path.name == "000001-rl-000001"
    assert found.files["learner/weights"][0] == 1000
    assert found.state == {"step": 1}


def test_the_newest_ones_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 11):
        write(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002-rl-000002", "000003-rl-000011"]
    assert newest_step(tmp_path) == 11


def test_numbers_go_on_in_another_process(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path, keep=1), 5)
    assert write(CheckpointStore(tmp_path, keep=1), 3).path.name == "000002-rl-000003"
    assert newest_step(tmp_path) == 3


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "missing", "no manifest", "half a manifest", "format"])
def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    path = write(store, 2).path
    weights, manifest = path / "learner" / "weights", path / MANIFEST
    match damage:
        case "other bytes":
            weights.write_bytes(b"\0" + weights.read_bytes()[1:])
        case "shorter":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "missing":
            weights.unlink()
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "format":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    told: list[str] = []
    found = CheckpointStore(tmp_path, keep=2).newest(told.append)
    assert found is not None
    assert found.state == {"step": 1}
    [report] = told
    assert str(path) in report


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)

    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(b"some")
        raise RuntimeError("the learner is gone")

    with pytest.raises(RuntimeError):
        store.write("rl-000002", {}, 0, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["000001-rl-000001"]


def test_a_process_that_dies_at_any_moment_of_a_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    moments = 0
    for moment in range(1, 100):
        root = tmp_path / str(moment)
        write(CheckpointStore(root, keep=1), 1)
        command = [sys.executable, "-c", WRITER, str(root), str(moment)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        step = newest_step(root)
        assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
        moments += 1
        assert step in (1, 2)
    assert moments >= 6
    assert step == 2


def test_the_place_of_the_file_at_fault_is_named(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path, keep=1), 1).path
    (path / "learner" / "weights").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights: must have 1,000 bytes, as its manifest says. Found: 0 bytes"):
        read_checkpoint(path).check_sizes()
