"""The built-in reward `reasoning_gym`: the score that a reasoning-gym data set gives an answer, made safe to train on.

The scorers of the package were written for benchmarks, not for a policy that looks for the highest number. Of the 105
data sets of version 0.1.25, 42 pay something for text that answers nothing, twelve of them for an empty one, and three
raise. Nine run the answer as Python (`eval`, sympy's `parse_expr`). So an empty answer is 0 without asking; partial
credit is off, and measured against texts that answer nothing when it is on; an answer that could run anything but a
list or a formula is 0 without being passed on; what the scorer cannot read is 0, provided that it can read the data
set's own answer.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from rewards.answers import last_boxed
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import ConfigError, DataError

MAX_ANSWER_CHARS = 10_000

LISTS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Data sets that call `eval` on the answer."""

FORMULAS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Data sets that call `sympy.parse_expr` on it, which evaluates too."""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LIST = re.compile(r"[\w\s,\[\]'\"-]*")  # no call, operator or attribute can be written with these
_NAMES = (
    "Abs|acos|acosh|acot|asec|acsc|asin|asinh|atan|atanh|cos|cosh|cot|csc|erf|exp|log|ln|pi|sec|sin|sinh|sqrt|tan|tanh"
)
_FORMULA = re.compile(rf"(?:(?<![\w.])\d{{1,9}}(?:\.\d{{1,9}})?(?![\w.])|\b(?:{_NAMES}|[A-Za-z])\b|[-+*/(),\s])*")
_POWER = re.compile(r"(\)?)\s*\*\*\s*(?:\(?\s*-?\s*(\d+)|[A-Za-z])?")
_MAX_EXPONENT = 64
_HUGE = re.compile(r"\d[eE][+-]?\d{4}")  # Fraction("1e999999999") never ends

_NOTHING = ("?", "no answer", "I will not try to answer this one. " * 8)
"""Texts that answer no problem of any data set; the best score of them is what a text gets for being one."""


@reward("reasoning_gym", requires=("reasoning-gym",))
def reasoning_gym(sample: RewardInput, partial_credit: bool = False) -> Score:
    """1.0 where the data set's scorer gives full marks, else 0.0; part `score` is what it gave.

    With `partial_credit` (score - floor) / (1 - floor), where `floor` is the best score of texts that answer nothing.
    The answer is inside the last `<answer>` tags, else the last box, else all of the final text. The record says
    `metadata.dataset`, `metadata.params` and `metadata.entry`, as the source `reasoning_gym` writes them. Raises
    DataError for a record that cannot be judged, also where its scorer pays texts that answer nothing in full.
    """
    name, entry = _problem(sample.metadata)
    dataset = _dataset(name, json.dumps(sample.metadata.get("params") or {}, sort_keys=True))
    answer = stated_answer(sample.final)
    if refused := _refusal(name, answer):
        return Score(0.0, refused, {"score": 0.0})
    try:
        score = _score(dataset, answer, entry)
    except _Unreadable as error:
        _check_oracle(name, dataset, entry)
        return Score(0.0, f"the scorer cannot read it: {error}", {"score": 0.0})
    floor = _floor(dataset, entry) if score > 0.0 else 0.0
    if floor >= 1.0:
        reason = "Its scorer gives full marks to text that answers nothing"
        raise DataError(f"metadata.dataset = {name}: must tell answers apart. {reason}. Use another data set.")
    earned = max(0.0, (score - floor) / (1.0 - floor))
    return Score(earned if partial_credit else float(score >= 1.0), f"scored {score:g}", {"score": score})


def stated_answer(final: str) -> str:
    """The text that is scored, without surrounding white space."""
    tagged = _TAGGED.findall(final)
    if tagged:
        return str(tagged[-1]).strip()
    boxed = last_boxed(final)
    return (final if boxed is None else boxed).strip()


# --- the record -------------------------------------------------------------------------------------------------------


def _problem(metadata: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    name, entry = metadata.get("dataset"), metadata.get("entry")
    fix = "Use a source of kind reasoning_gym, or name these columns among the metadata columns of the data."
    if not isinstance(name, str) or not name:
        raise DataError(f"metadata.dataset = {name!r}: must name a data set. Its scorer is needed. {fix}")
    if not isinstance(entry, Mapping) or not {"question", "answer", "metadata"} <= entry.keys():
        rule = "must be an object with question, answer and metadata"
        raise DataError(f"metadata.entry = {entry!r:.80}: {rule}. The scorer reads it. {fix}")
    return name, entry


@functools.lru_cache(maxsize=32)
def _dataset(name: str, params: str) -> Any:
    """The data set, of which only the scorer is used. Raises ConfigError or DataError where there is no such one."""
    try:
        import reasoning_gym as package
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        fix = 'Run: pip install "groupwise[reasoning-gym]".'
        rule = "needs the package reasoning-gym"
        raise ConfigError([f"reward = reasoning_gym: {rule}. It cannot be imported: {error}. {fix}"]) from error
    if name not in DATASETS:
        raise DataError(f"metadata.dataset = {name!r}: must be a data set of reasoning-gym. There is none. Correct it.")
    return package.create_dataset(name, **{"seed": 0, **json.loads(params)})


# --- scoring ----------------------------------------------------------------------------------------------------------


class _Unreadable(Exception):
    """The scorer raised, or gave no finite number."""


def _score(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """In [0, 1]. Raises _Unreadable."""
    try:
        with warnings.catch_warnings(action="ignore"):
            score = float(dataset.score_answer(answer, copy.deepcopy(entry)))
    except MemoryError:
        raise
    except Exception as error:  # whatever it is, the scorer must not raise it over its own answer: see _check_oracle
        raise _Unreadable(f"{type(error).__name__}: {str(error)[:80]}") from error
    if not math.isfinite(score):
        raise _Unreadable(f"scored {score}")
    return min(1.0, max(0.0, score))


def _check_oracle(name: str, dataset: Any, entry: Mapping[str, Any]) -> None:
    """Raises DataError where the scorer cannot read the right answer either: then the record is at fault.

    Five data sets come without answers; of them nothing can be said.
    """
    if entry["answer"] is None:
        return
    try:
        _score(dataset, entry["answer"], entry)
    except _Unreadable as error:
        reason = f"The scorer cannot even read the right answer: {error}"
        raise DataError(f"metadata.entry of {name}: must be what the scorer expects. {reason}. Drop it.") from error


def _floor(dataset: Any, entry: Mapping[str, Any]) -> float:
    """The best score of a text that answers nothing; one that cannot be read has none."""
    scores = [0.0]
    for text in _NOTHING:
        try:
            scores.append(_score(dataset, text, entry))
        except _Unreadable:
            continue
    return max(scores)


# --- what is not passed on --------------------------------------------------------------------------------------------


def _refusal(name: str, answer: str) -> str:
    """Why the scorer is not to see this answer; "" when it may."""
    if not answer:
        return "no final answer"
    if len(answer) > MAX_ANSWER_CHARS:
        return f"longer than {MAX_ANSWER_CHARS} characters"
    if _HUGE.search(answer):
        return "a number too large to work out"
    if name in LISTS and not _LIST.fullmatch(answer):
        return "no list or text"
    if name in FORMULAS and not _harmless_formula(answer):
        return "no formula"
    return ""


def _harmless_formula(answer: str) -> bool:
    """Numbers, one-letter names, known functions and operators, with powers that can be worked out.

    `Integral(...)` is none of these: sympy would take the question, restated, for its answer.
    """
    if "//" in answer or not _FORMULA.fullmatch(answer):
        return False
    towers = 1
    for power in _POWER.finditer(answer):
        exponent = int(power.group(2) or 1)
        towers *= exponent if power.group(1) else 1
        if exponent > _MAX_EXPONENT or towers > _MAX_EXPONENT:
            return False
    return not re.search(r"\*\*\s*[-(\s]*[\w.]+\s*\*\*", answer)
