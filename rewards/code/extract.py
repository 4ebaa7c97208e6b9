"""Which text of a completion is the program: its last fenced block, closed, in the final answer."""

from __future__ import annotations

import re
from collections.abc import Collection

PYTHON = ("python", "py", "python3", "")

_FENCE = re.compile(r"^[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)


def last_block(text: str, languages: Collection[str] | None = None) -> str | None:
    """The inside of the last closed fence in `text`, or None.

    With `languages` (lower case, "" for no label) the last block alone counts, and must be labelled as one of them:
    a reader takes the last block for the answer, and so does the reward.
    """
    opened: tuple[str, str, int] | None = None
    found: tuple[str, str] | None = None
    for fence in _FENCE.finditer(text):
        marks, label = fence.group(1), fence.group(2)
        if opened is None:
            opened = (marks, label.lower(), fence.end() + 1)
        elif marks[0] == opened[0][0] and len(marks) >= len(opened[0]) and not label:
            found = (opened[1], text[opened[2] : fence.start()])
            opened = None
    if opened is not None or found is None:  # an open fence at the end: the program was cut off
        return None
    return found[1] if languages is None or found[0] in languages else None
