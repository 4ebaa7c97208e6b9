"""Tell the life of a sample or a group: when it was dispatched, how it ended, its reward, its advantage.

python -m rlhf.why RUN rl-000012/3
python -m rlhf.why RUN rl-000012
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf import jsonl, ledger
from rlhf.checkpoints.journal import Journal
from rlhf.checkpoints.resume import JOURNAL
from rlhf.errors import GroupwiseError
from rlhf.tracking import SAMPLES_FILE

_SHOWN = ("reward", "correct", "parts", "advantage", "finish_reason", "versions", "note")


def life(run_dir: Path, identity: str) -> str:
    """Readable lines about a sample id or a group id. DataError, with the nearest id, if the run has no such group."""
    group_id = identity.partition("/")[0]
    lines = [ledger.why(run_dir, group_id)]
    rows = list(_rows(run_dir / SAMPLES_FILE, identity))
    for row in rows:
        shown = [f"{key} {row[key]}" for key in _SHOWN if row.get(key) not in (None, "", {})]
        lines.append(f"  sample {row['sample_id']} of stage {row['stage']}, step {row['step']}: {', '.join(shown)}")
    if not rows:
        lines.append(f"  not in {SAMPLES_FILE}, which has some samples of every `tracking.samples_every` steps")
    lines += _replay(run_dir, group_id)
    return "\n".join(lines)


def _rows(path: Path, identity: str) -> Iterator[Mapping[str, Any]]:
    key = "sample_id" if "/" in identity else "group_id"
    return (row for row in jsonl.read(path) if row[key] == identity) if path.exists() else iter(())


def _replay(run_dir: Path, group_id: str) -> Iterator[str]:
    stage = group_id.rpartition("-")[0]
    for event in ledger.history(run_dir / ledger.FILE_NAME, group_id):
        if event.event == "trained" and Journal(run_dir / JOURNAL / stage).directory(int(event.detail or 0)).exists():
            yield f"  train it again: python -m rlhf.replay {run_dir} --stage {stage} --step {event.detail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after an error message."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.why", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of the run")
    parser.add_argument("id", metavar="ID", help="of a sample or of a group")
    options = parser.parse_args(arguments)
    try:
        print(life(options.run, options.id))
    except GroupwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
