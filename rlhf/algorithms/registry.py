"""Algorithms by name. Every module of this package is imported once, so a new file needs no list to be edited."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from rlhf.algorithms.base import Algorithm
from rlhf.errors import ConfigError, did_you_mean
from rlhf.plugins import load_modules

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


def build(name: str, hyperparameters: Mapping[str, Any], modules: Sequence[str] = ()) -> Algorithm:
    """The algorithm `name` with its hyper-parameters, after the user's own `modules` have registered theirs.

    Raises ConfigError for an unknown name or module, `pydantic.ValidationError` for a wrong hyper-parameter.
    """
    load_modules("algorithm.modules", modules)
    if name not in names():
        fix = f"{did_you_mean(name, names())} algorithm.modules can register more."
        raise ConfigError([f"algorithm.name = {name}: must be a registered algorithm. None has this name. {fix}"])
    return _algorithms[name](**hyperparameters)


def algorithm(name: str) -> type[Algorithm]:
    """The registered class."""
    names()
    return _algorithms[name]
