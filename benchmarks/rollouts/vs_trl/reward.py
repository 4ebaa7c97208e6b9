"""The reward of both trainers, in TRL's form."""

from __future__ import annotations

import re
from typing import Any


def reward(completions: list[list[dict[str, str]]], answer: list[str], ends: list[bool], **_: Any) -> list[float]:
    """1 where the text holds the answer as a word of its own, and ends with it where it must."""
    texts = [completion[0]["content"].strip() for completion in completions]
    return [_correct(*sample) for sample in zip(texts, answer, ends, strict=True)]


def _correct(text: str, answer: str, ends: bool) -> float:
    return float(re.search(rf"\b{re.escape(answer)}\b" + (r"\W*$" if ends else ""), text) is not None)
