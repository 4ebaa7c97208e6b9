"""What `python -m rewards test` tries the built-in rewards with: rows as `score` reads them, with `expected`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Example = Mapping[str, Any]


def _row(prompt: str, completion: str, answer: str, expected: float | str, **fields: Any) -> Example:
    row = {"prompt": prompt, "completion": completion, "answer": answer, "expected": expected}
    return row | {"metadata": fields.pop("metadata", {})} | fields


def _asked(prompt: str, answer: str, completions: Mapping[str, float | str], **metadata: Any) -> list[Example]:
    return [_row(prompt, text, answer, value, metadata=metadata) for text, value in completions.items()]


CAPITAL = "Which is the capital of Korea?\nA) Busan\nB) Seoul\nC) Daegu"
OPTIONS = ["Busan", "Seoul", "Daegu"]
PLANET = "Which planet is the largest?\nA) Jupiter\nB) Mars\nC) Venus"
PLANETS = {"A": "Jupiter", "B": "Mars", "C": "Venus"}
BOX = {"box": [10, 10, 50, 50], "coordinates": "pixels", "width": 100, "height": 100}
TWO_WORDS = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

SUM: Mapping[str, Any] = {
    "question": "State the final answer to the following arithmetic problem: 4 + 5 =",
    "answer": "9",
    "metadata": {},
}

EXAMPLES: dict[str, Sequence[Example]] = {
    "math": [
        *_asked("What is 17 + 25?", "42", {"17 + 25 is \\boxed{42}.": 1, "It is 42": 1, "\\boxed{43}": 0, "42.5": 0}),
        *_asked("What is one half?", "\\frac{1}{2}", {"\\boxed{0.5}": 1, "The answer is $1/2$.": 1, "\\boxed{2}": 0}),
        *_asked("Solve x^2 = 4 for x > 0.", "2", {"<think>3?</think>\\boxed{2}": 1, "<think>\\boxed{2}</think>no": 0}),
        _row("No answer was recorded.", "1", "", "error"),
    ],
    "science": [
        *_asked("How many protons has carbon?", "6", {"The answer is 6.": 1, "Carbon has \\boxed{12}.": 0}),
        *_asked(CAPITAL, "B", {"The answer is B.": 1, "The answer is A.": 0}, options=OPTIONS),
    ],
    "multiple_choice": [
        *_asked(
            CAPITAL,
            "B",
            {"The answer is (B).": 1, "정답은 B입니다.": 1, "A or B": 0, "I am not sure.": 0},
            options=OPTIONS,
        ),
        *_asked(PLANET, "A", {"\\boxed{A}": 1, "Jupiter": 1, "C": 0}, options=PLANETS),
        _row("Which?", "A", "A", "error"),
    ],
    "format": [
        _row("Say hello.", "Hello.", "", 1),
        _row("Say hello.", "<think>short</think>Hello.", "", 1, reasoning_mode=True),
        _row("Say hello.", "<think>never closed", "", 0, reasoning_mode=True),
        _row("Say hello.", "Hello.<|im_end|>", "", 0),
        _row("Say hello.", "Hel", "", 0, truncated=True),
        _row("Say hello.", "", "", 0),
    ],
    "language_consistency": [
        _row("What is the weather like today?", "It is sunny and warm.", "", 1),
        _row("오늘 날씨가 어때요?", "맑고 따뜻합니다.", "", 1),
        _row("오늘 날씨가 어때요?", "It is sunny and warm.", "", 0),
        _row("What is 6 times 7?", "42", "", "abstain"),
    ],
    "conciseness": [
        _row("Explain.", "Short.", "", 1, completion_tokens=10),
        _row("Explain.", "Half way.", "", 0.5, completion_tokens=150),
        _row("Explain.", "Long.", "", 0, completion_tokens=500),
    ],
    "overlong": [
        _row("Explain.", "Short.", "", 0, completion_tokens=10),
        _row("Explain.", "Half way.", "", -0.5, completion_tokens=150),
        _row("Explain.", "Cut", "", -1, completion_tokens=200, truncated=True),
    ],
    "repetition": [
        _row("Explain.", "No word of this short text occurs twice.", "", 0),
        _row("Explain.", "again " * 220, "", -200 / 201),
    ],
    "counting": [
        *_asked(
            "How many dogs are there?",
            "3",
            {"There are three dogs.": 1, "\\boxed{3}": 1, "I see 4 dogs.": 0, "3 or 4": 0},
        ),
        *_asked("How many cats are there?", "12", {"The answer is 12.": 1, "1": 0}),
    ],
    "ocr_anls": _asked("Which brand is on the sign?", "Coca Cola", {"Coca Cola": 1, "coca  cola": 1, "Pepsi Max": 0}),
    "chart_relaxed": [
        *_asked("What was the revenue?", "200", {"The answer is 205.": 1, "The answer is 240.": 0}),
        *_asked("In which year was it highest?", "2015", {"The answer is 2015.": 1, "The answer is 2016.": 0}),
    ],
    "grounding_iou": _asked(
        "Where is the dog?", "", {"[10, 10, 50, 50]": 1, "[60, 60, 90, 90]": 0, "[10, 10, 50, 30]": 0.5}, **BOX
    ),
    "instruction_following": _asked("Use no comma.", "", {"None is here.": 1, "One, at least.": 0}, **TWO_WORDS),
    "code": _asked(
        "Write `double(x)`.",
        "",
        {"```python\ndef double(x):\n    return 2 * x\n```": 1, "```python\ndef double(x):\n    return x\n```": 0},
        tests=[{"call": "double", "args": [5], "expected": 10}],
    ),
    "judge": [
        *_asked("What is the capital of France?", "Paris", {"It is \\boxed{Paris}.": 1, "The answer is Rome.": 0}),
        *_asked("Which metal is liquid at room temperature?", "mercury", {"\\boxed{mercury}": 1, "Solution:": 0}),
        _row("No answer was recorded.", "1", "", "error"),
    ],
    "judge_pairwise": _asked(
        "Why is the sky blue?", "", {"Air scatters short waves, which are blue, more than long ones.": 1, "No idea.": 0}
    ),
    "preference": [
        _row("How do I boil an egg?", "Put it into boiling water for seven minutes.", "", "value"),
        _row("How do I boil an egg?", "eggs eggs eggs", "", "value"),
        _row("How do I boil an egg?", "<think>Seven", "", 0, reasoning_mode=True),
        _row("How do I boil an egg?", "", "", 0),
    ],
    "reasoning_gym": _asked(
        SUM["question"],
        SUM["answer"],
        {"\\boxed{9}": 1, "<answer>9</answer>": 1, "8": 0, "": 0},
        dataset="chain_sum",
        entry=SUM,
    ),
}
"""Built-in reward -> its examples. Those of models were written for any model that does its work."""

_PARAMS: dict[str, Mapping[str, Any]] = {
    "conciseness": {"target_tokens": 100, "max_tokens": 200},
    "overlong": {"max_tokens": 200, "cache_tokens": 100},
    # So that every run of an example asks the judge again.
    "judge": {"cache": {"entries": 0}},
    "judge_pairwise": {"cache": {"entries": 0}},
}
PARAMS: dict[str, Mapping[str, str]] = {
    name: {key: json.dumps(value) for key, value in params.items()} for name, params in _PARAMS.items()
}
"""Built-in reward -> its parameters in the examples; those of the command line come before them."""

GENERIC: Sequence[Example] = [
    {"prompt": "What is 17 + 25?", "completion": "17 + 25 is \\boxed{42}.", "answer": "42"},
    {"prompt": "What is 17 + 25?", "completion": "I do not know.", "answer": "42"},
    {"prompt": "Say hello.", "completion": "<think>Be brief.</think>Hello!", "answer": "Hello!"},
]
"""For rewards that nothing is known of: what they return is not judged."""
