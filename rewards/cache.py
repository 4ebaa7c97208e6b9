"""Verdicts by what was judged: the same sample is judged once."""

from __future__ import annotations

import hashlib
import io
import pickle
import threading
from collections import OrderedDict
from typing import Any

from rewards.child import Answer, Call


class AnswerCache:
    """The last `entries` answers, by content. Thread-safe. Answers with a failure are never kept."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()

    def get(self, key: bytes) -> Answer | None:
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def put(self, key: bytes, answer: Answer) -> None:
        if answer.failure is not None or not self._entries:
            return
        with self._lock:
            self._answers[key] = answer
            while len(self._answers) > self._entries:
                self._answers.popitem(last=False)

    def __len__(self) -> int:
        return len(self._answers)


def content_key(call: Call, version: Any) -> bytes:
    """A hash of all that the verdict depends on: the reward, its `version`, its parameters and the sample or group."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=5)
    # Without the memo equal content gives equal bytes, whether or not two fields are one object.
    pickler.fast = True
    pickler.dump((call.component, version, dict(call.params), call.sample))
    return hashlib.sha256(buffer.getvalue()).digest()
