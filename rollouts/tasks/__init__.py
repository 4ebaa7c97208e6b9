"""Procedural tasks: families of problems made on the fly, each verified by one reward. Importing this registers all."""

from rollouts.tasks import arithmetic, constrained, programs  # noqa: F401 they register their families
from rollouts.tasks.families import (
    HELD_OUT_SHARE,
    Problem,
    Split,
    TaskFamily,
    digest,
    family_names,
    get_family,
    task_family,
)

__all__ = [
    "HELD_OUT_SHARE",
    "Problem",
    "Split",
    "TaskFamily",
    "digest",
    "family_names",
    "get_family",
    "task_family",
]
