"""Algorithms by name. Every module of this package is imported once, so a new file needs no list to be edited."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from rlhf.algorithms.base import Algorithm
from rlhf.errors import ConfigError

_algorithms: dict[str, type[Algorithm]] = {}


def register(name: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Class decorator: `@register("grpo_icepop")`. A name can be taken once."""

    def add(algorithm: type[Algorithm]) -> type[Algorithm]:
        taken = _algorithms.get(name, algorithm)
        # A module that is imported again registers the same class again; a copied file with the old name does not.
        if (taken.__module__, taken.__qualname__) != (algorithm.__module__, algorithm.__qualname__):
            raise ValueError(f"algorithm {name!r} is already registered by {taken.__module__}")
        _algorithms[name] = algorithm
        return algorithm

    return add


@cache
def _import_all() -> None:
    package = importlib.import_module("rlhf.algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"rlhf.algorithms.{module.name}")


def names() -> list[str]:
    _import_all()
    return sorted(_algorithms)


def build(name: str, hyperparameters: Mapping[str, Any]) -> Algorithm:
    """The algorithm `name` with its hyper-parameters.

    Raises ConfigError for an unknown name, `pydantic.ValidationError` for a wrong hyper-parameter.
    """
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        known = ", ".join(names())
        raise ConfigError([f"algorithm.name = {name}: must be a registered algorithm. {hint}Known: {known}."])
    return _algorithms[name](**hyperparameters)
