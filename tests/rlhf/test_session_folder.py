"""The folders of runs that were killed are cleared away, and those of runs that live are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rlhf.runtime.session_folder import SessionFolder, sweep

LIVING = """
import sys, time
from pathlib import Path
from rlhf.runtime.session_folder import SessionFolder
folder = SessionFolder(Path(sys.argv[1]))
(folder.path / "session").mkdir()
print(folder.path, flush=True)
time.sleep(60)
"""


def test_a_folder_is_swept_once_its_run_was_killed(tmp_path: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", LIVING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert living.stdout is not None
    path = Path(living.stdout.readline().strip())
    assert (path / "session").is_dir()
    assert sweep(tmp_path) == []
    living.kill()
    living.communicate()
    assert sweep(tmp_path) == [path]
    assert not path.exists()


def test_a_new_run_sweeps_and_its_own_folder_goes_with_it(tmp_path: Path) -> None:
    other = tmp_path / "groupwise-of-an-older-version"
    other.mkdir()
    folder = SessionFolder(tmp_path)
    assert sweep(tmp_path) == []
    folder.remove()
    assert list(tmp_path.iterdir()) == [other], "without a lock nobody can tell whether its run lives"
