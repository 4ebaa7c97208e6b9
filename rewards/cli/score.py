"""`score`: the rows of a file with their rewards, streamed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rewards.cli.rows import check, read_rows
from rewards.cli.service import Result, RowService, rewards_config
from rlhf.errors import DataError

PROGRESS_S = 5.0


@dataclass
class Progress:
    """What has come so far, told on standard error every PROGRESS_S."""

    total: int
    statuses: Counter[str] = field(default_factory=Counter)
    value_sum: float = 0.0
    started: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    first_error: Result | None = None

    def add(self, result: Result) -> None:
        status = result.outcome["status"]
        self.statuses[status] += 1
        self.value_sum += result.outcome["value"] or 0.0
        if status == "error" and self.first_error is None:
            self.first_error = result
        if time.monotonic() - self.told > PROGRESS_S:
            self.told = time.monotonic()
            print(f"{self.statuses.total()} of {self.total} rows", file=sys.stderr)

    def report(self) -> str:
        values, abstained, errors = (self.statuses[status] for status in ("value", "abstain", "error"))
        mean = f", mean {self.value_sum / values:.4g}" if values else ""
        seconds = time.monotonic() - self.started
        text = f"{self.total} rows in {seconds:.1f} s: {values} values{mean}; {abstained} abstentions; {errors} errors"
        if self.first_error is None:
            return text
        error = self.first_error.outcome
        trace = error["error"]["traceback"]
        return f"{text}\nfirst error, {self.first_error.row.place}: {error['reason']}\n{trace}".rstrip()


def run(options: argparse.Namespace) -> int:
    """0 when every row has a value or an abstention, 1 when one has an error. DataError for malformed rows."""
    if options.output is not None and options.output.resolve() == options.file.resolve():
        raise DataError(f"--output {options.output}: must not be the file that is read. Name another.")
    progress = Progress(check(options.file))
    config = rewards_config(options, [options.name])
    with RowService(config) as service, _output(options.output) as output:
        for result in service.results(options.name, read_rows(options.file)):
            line = {**result.row.fields, **result.outcome}
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
            progress.add(result)
    print(progress.report(), file=sys.stderr)
    return 1 if progress.statuses["error"] else 0


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        file = path.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(f"--output {path}: must be a file that can be written. {error.strerror}.") from error
    with file:
        yield file
