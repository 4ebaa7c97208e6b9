"""The built-in reward `ocr_anls`: how near the text that was read is to the text that is there."""

from __future__ import annotations

import unicodedata

from rewards.answers import last_boxed
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError


@reward("ocr_anls")
def ocr_anls(sample: RewardInput, threshold: float = 0.5) -> Score:
    """ANLS: the best of `1 - edit distance / longer length` over the references, 0 from a distance of `threshold` on.

    The references are `metadata.answers`, or else the record's answer. The candidate is the last box, else all of the
    final text. Case, width and white space do not count. Raises DataError without a reference and ValueError unless
    0 < threshold <= 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold = {threshold}: must be in (0, 1]. It bounds the distance. Correct the params of ocr_anls"
        )
    references = [normalise(text) for text in _references(sample)]
    candidate = normalise(last_boxed(sample.final) or sample.final)
    if not candidate:
        return Score(0.0, "no final answer")
    distance = min(_relative_distance(candidate, reference, threshold) for reference in references)
    return Score(1 - distance if distance < threshold else 0.0, f"distance {distance:.2f}: {candidate[:80]}")


def normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance by Myers' bit vectors: one big-integer step per character of `second`."""
    if not first:
        return len(second)
    positions: dict[str, int] = {}
    for index, character in enumerate(first):
        positions[character] = positions.get(character, 0) | 1 << index
    mask, last, distance = (1 << len(first)) - 1, 1 << (len(first) - 1), len(first)
    plus, minus = mask, 0  # bit i: the column grows, or falls, by one from row i to row i + 1
    for character in second:
        equal = positions.get(character, 0)
        diagonal = ((((equal & plus) + plus) ^ plus) | equal | minus) & mask
        grows, falls = minus | ~(diagonal | plus) & mask, plus & diagonal
        distance += bool(grows & last) - bool(falls & last)
        grows, falls = (grows << 1 | 1) & mask, falls << 1 & mask
        plus, minus = falls | ~(diagonal | grows) & mask, grows & diagonal
    return distance


def _references(sample: RewardInput) -> list[str]:
    given = sample.metadata.get("answers")
    references = [sample.answer] if given is None else given
    if isinstance(references, str) or not references or not all(isinstance(t, str) and t.strip() for t in references):
        raise DataError(
            f"metadata.answers = {given!r}, answer = {sample.answer!r}: must be texts that are not empty. "
            "The answer is compared with them. Fix or drop the record."
        )
    return list(references)


def _relative_distance(candidate: str, reference: str, threshold: float) -> float:
    longer = max(len(candidate), len(reference))
    if abs(len(candidate) - len(reference)) >= threshold * longer:
        return 1.0  # too far by length alone, whatever the letters
    return edit_distance(candidate, reference) / longer
