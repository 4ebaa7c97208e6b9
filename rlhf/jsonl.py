"""One JSON object a line, flushed line by line: what a killed run leaves behind can still be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import DataError


class JsonLines:
    """Appends to `path`. A last line that a killed process left unfinished is cut off: `cut_bytes` of it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.cut_bytes = _cut_unfinished_line(path)
        # A lone surrogate cannot be encoded; as a backslash escape it is valid JSON and reads back unchanged.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line and hands it to the operating system. ValueError for NaN and infinity: JSON has neither."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of `path`. A last line without its newline is still being written and is left out.

    Raises DataError with the line number where any other line is not JSON.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not a JSON line ({error}). Remove the line to read the rest."
                ) from error


def cut(path: Path, size: int) -> None:
    """Take from `path` what follows its first `size` bytes, and keep that in a file beside it.

    Raises DataError where the file is shorter.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise DataError(f"{path}: must have {size:,} bytes or more, as the checkpoint says, and has {found:,}.")
    if found == size:
        return
    with path.open("r+b") as file:
        file.seek(size)
        with path.with_suffix(".discarded.jsonl").open("ab") as discarded:
            shutil.copyfileobj(file, discarded)
        file.truncate(size)


def _cut_unfinished_line(path: Path) -> int:
    if not path.exists():
        return 0
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with path.open("r+b") as file:
            file.truncate(complete)
    return len(content) - complete
