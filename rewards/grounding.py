"""The built-in reward `grounding_iou`: how well one box in the answer covers the box in the record."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from rewards.registry import RewardInput, Score, reward
from rlhf.errors import DataError

_NUMBER = r"\s*([+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf(?:inity)?))\s*"
_CORNERS = rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"
_LIST = rf"[\[(<]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])>]"
_BOX = re.compile(rf"{_LIST}|{_CORNERS}", re.IGNORECASE)

SPACES = ("pixels", "unit", "thousandths")


@dataclass(frozen=True, slots=True)
class Box:
    """Corners with x1 < x2 and y1 < y2, finite and inside the image."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)


@reward("grounding_iou")
def grounding_iou(sample: RewardInput, threshold: float | None = None) -> Score:
    """Intersection over union of the only box in the final text with `metadata.box`, in [0, 1].

    `metadata.coordinates` is the space of both: `pixels` (with `metadata.width` and `height`), `unit` (0 to 1) or
    `thousandths` (0 to 1000); boxes are `[x1, y1, x2, y2]` or `(x1, y1), (x2, y2)`. With `threshold` it is 1.0 from
    there on, else 0.0, and the part `iou` keeps the number. No box, two, one that is inverted, empty, out of range or
    not finite gets 0.0. Raises DataError when the record's own box breaks these rules, ValueError unless 0 <
    threshold <= 1.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold = {threshold}: must be null or in (0, 1]. Correct the params of grounding_iou")
    limits = _limits(sample.metadata)
    gold = _gold(sample.metadata, limits)
    found = [[float(n) for n in match.groups() if n is not None] for match in _BOX.finditer(sample.final)]
    if len(found) != 1:
        return Score(0.0, f"{len(found)} boxes in the answer, exactly 1 wanted", {"iou": 0.0})
    fault = _fault(found[0], limits)
    if fault:
        return Score(0.0, f"box {found[0]}: {fault}", {"iou": 0.0})
    iou = intersection_over_union(gold, Box(*found[0]))
    return Score(iou if threshold is None else float(iou >= threshold), f"IoU {iou:.3f}", {"iou": iou})


def intersection_over_union(first: Box, second: Box) -> float:
    width = min(first.x2, second.x2) - max(first.x1, second.x1)
    height = min(first.y2, second.y2) - max(first.y1, second.y1)
    common = max(0.0, width) * max(0.0, height)
    return common / (first.area + second.area - common)


def _limits(metadata: Mapping[str, Any]) -> tuple[float, float]:
    """The largest x and y of the record's coordinate space."""
    space = metadata.get("coordinates")
    if space not in SPACES:
        raise DataError(
            f"metadata.coordinates = {space!r}: must be one of {', '.join(SPACES)}. Boxes of different spaces "
            "cannot be compared. Say it in the record, and in the prompt."
        )
    if space != "pixels":
        return (1.0, 1.0) if space == "unit" else (1000.0, 1000.0)
    width, height = metadata.get("width"), metadata.get("height")
    if not all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in (width, height)):
        raise DataError(
            f"metadata.width, height = {width!r}, {height!r}: must be numbers above 0. Pixels need the size of the "
            "image the model saw. Fix the record."
        )
    return float(width), float(height)  # type: ignore[arg-type]


def _gold(metadata: Mapping[str, Any], limits: tuple[float, float]) -> Box:
    box = metadata.get("box")
    numeric = isinstance(box, Sequence) and not isinstance(box, str) and all(isinstance(n, Real) for n in box)
    fault = _fault([float(n) for n in box], limits) if numeric and box is not None else "not a list of numbers"
    if fault or box is None:
        raise DataError(
            f"metadata.box = {box!r}: must be [x1, y1, x2, y2] in {metadata['coordinates']}, but: {fault}. "
            "The answer is compared with it. Fix or drop the record."
        )
    return Box(*(float(n) for n in box))


def _fault(numbers: list[float], limits: tuple[float, float]) -> str:
    """What makes four numbers no box; "" when they are one."""
    if len(numbers) != 4:
        return f"{len(numbers)} numbers, not 4"
    if not all(map(math.isfinite, numbers)):
        return "not finite"
    x1, y1, x2, y2 = numbers
    if min(numbers) < 0 or max(x1, x2) > limits[0] or max(y1, y2) > limits[1]:
        return f"outside 0 to {limits[0]:g} by 0 to {limits[1]:g}"
    if not (x1 < x2 and y1 < y2):
        return "inverted or empty"
    return ""
