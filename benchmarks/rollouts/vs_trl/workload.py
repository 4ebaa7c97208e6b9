"""The prompts of both trainers, as JSON lines with the columns `prompt`, `answer` and `ends`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.config import ProceduralSource
from rollouts.prompts import PromptStream, open_source

_CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Cuba": "Havana",
}
_PLACES = ("lighthouse", "castle", "forest", "harbour", "desert", "village")
_HEROES = ("fox", "sailor", "child", "robot", "baker", "queen")


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arithmetic(count: int) -> Iterator[dict[str, Any]]:
    """The quickstart's problems. A completion must end with the answer."""
    stream = PromptStream(open_source(ProceduralSource(kind="procedural")), 1)
    for _ in range(count):
        prompt = stream.next()
        yield {"prompt": [dict(message) for message in prompt.messages], "answer": prompt.answer, "ends": True}


def long_tailed(count: int) -> Iterator[dict[str, Any]]:
    """Questions with short answers, and every eighth one for a story, which an instruction-tuned model makes long."""
    rng = random.Random(0)
    for number in range(count):
        if number % 8 == 1:
            place, hero = rng.choice(_PLACES), rng.choice(_HEROES)
            question, answer = f"Write a long story about a {hero} in a {place}.", place
        elif rng.random() < 0.5:
            country = rng.choice(list(_CAPITALS))
            question, answer = f"What is the capital of {country}? Answer with one word.", _CAPITALS[country]
        else:
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            question, answer = f"What is {a} plus {b}? Answer with the number only.", str(a + b)
        yield {"prompt": [{"role": "user", "content": question}], "answer": answer, "ends": False}
