"""Verdicts by what they depend on, in memory and, where wished, in a file. Errors are never kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from rewards.judge.settings import CacheSettings
from rlhf.errors import ConfigError

Entry = dict[str, Any]


def key_of(**parts: Any) -> str:
    """The same for equal parts, in whatever order objects in them have their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class VerdictCache:
    """The latest used `entries`. A file that cannot be used is a ConfigError at the start, not a miss later."""

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._kept: OrderedDict[str, Entry] = OrderedDict()
        self._path = Path(settings.path).expanduser() if settings.path else None
        if self._path is not None:
            self._load(self._path)

    def get(self, key: str) -> Entry | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: str, entry: Entry) -> None:
        self._keep(key, entry)
        if self._path is not None:
            line = json.dumps({"key": key, "verdict": entry}).encode() + b"\n"
            # One write to the end of the file: processes that share it do not mix their lines.
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)

    def _keep(self, key: str, entry: Entry) -> None:
        self._kept[key] = entry
        self._kept.move_to_end(key)
        while len(self._kept) > self._settings.entries:
            self._kept.popitem(last=False)

    def _load(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                for line in file:
                    self._read(line)
                _end_line(file)
        except OSError as error:
            fix = "Name a file in a folder that the reward workers can write to."
            problem = f"cache.path = {str(path)!r}: must be a writable file. {error.strerror}. {fix}"
            raise ConfigError([problem]) from None

    def _read(self, line: bytes) -> None:
        """Keep one line's verdict. A line that a killed process left half-written holds none."""
        try:
            found = json.loads(line)
            key, verdict = found["key"], found["verdict"]
        except (ValueError, KeyError, TypeError):
            return
        if isinstance(key, str) and isinstance(verdict, dict):
            self._keep(key, verdict)


def _end_line(file: Any) -> None:
    """So that the next line does not continue a half-written one."""
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
