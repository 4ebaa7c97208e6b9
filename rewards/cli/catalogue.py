"""`list` and `show`: what is registered, read off the functions themselves."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout

from rewards import foreign, registry
from rewards.cli.service import brought_config
from rewards.registry import RewardFunction
from rewards.scorer import brought
from rlhf.errors import ConfigError
from rlhf.plugins import load_modules

_METADATA = re.compile(r"metadata\.(\w+)")


def list_rewards(options: argparse.Namespace) -> int:
    _load(options.module)
    rows = [("NAME", "RANGE", "KIND", "ABOUT")]
    for name in registry.names():
        entry = registry.lookup(name)
        rows.append((name, _range(entry), _kind(entry), _missing(entry) + _summary(entry)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    return 0


def show(options: argparse.Namespace) -> int:
    _load(options.module)
    if options.path or options.url:
        with redirect_stdout(sys.stderr):
            registry.names()
            for one in brought(brought_config(options, [options.name]).components):
                foreign.register(one)
    print("\n".join(_page(registry.lookup(options.name), options)))
    return 0


def _load(modules: list[str]) -> None:
    with redirect_stdout(sys.stderr):  # what an author's module prints is no result
        load_modules("--module", modules)


def _page(entry: RewardFunction, options: argparse.Namespace) -> Iterator[str]:
    yield f"{entry.name}: {_kind(entry)} reward in {_range(entry)}"
    yield f"defined at {entry.location}"
    if entry.missing_packages:
        yield f"needs packages that are not installed: pip install {' '.join(entry.missing_packages)}"
    yield f"\n{inspect.getdoc(entry.function) or '(no docstring)'}\n"
    yield "parameters (rewards.components.NAME.params):".replace("NAME", entry.name)
    yield from _parameters(entry)
    fields = sorted(set(_METADATA.findall(inspect.getdoc(entry.function) or "")))
    yield f"reads metadata: {', '.join(fields) or '(its docstring names none)'}"
    yield "\nconfiguration:\n"
    yield from _yaml(entry, options)


def _parameters(entry: RewardFunction) -> Iterator[str]:
    try:
        parameters = list(inspect.signature(entry.function).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise ConfigError([f"{entry.name}: {error}. Its parameters cannot be read. Give it a signature."]) from error
    yield from (f"  {_parameter(parameter)}" for parameter in parameters)
    if not parameters:
        yield "  (none)"


def _parameter(parameter: inspect.Parameter) -> str:
    if isinstance(parameter.annotation, str):  # as it is written, without the quotes that inspect puts round it
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        return f"{parameter.name}: {parameter.annotation}{default}"
    return str(parameter)


def _yaml(entry: RewardFunction, options: argparse.Namespace) -> Iterator[str]:
    yield "rewards:"
    if options.module:
        yield f"  modules: [{', '.join(options.module)}]"
    yield f"  components:\n    {entry.name}:\n      weight: 1.0"
    yield "      applies: routed  # where the record names it; always: on every sample"
    for key in ("path", "url", "style", "low", "high"):
        if getattr(options, key) is not None:
            yield f"      {key}: {getattr(options, key)}"
    if entry.requires:
        yield "      params:"
        yield from (f"        {name}: ...  # has no default" for name in entry.requires)


def _range(entry: RewardFunction) -> str:
    return f"[{entry.low:g}, {entry.high:g}]"


def _kind(entry: RewardFunction) -> str:
    return " ".join(["async" if entry.is_async else "sync", *(["group"] if entry.group else [])])


def _missing(entry: RewardFunction) -> str:
    return f"(needs {', '.join(entry.missing_packages)}) " if entry.missing_packages else ""


def _summary(entry: RewardFunction) -> str:
    return (inspect.getdoc(entry.function) or "").partition("\n")[0]
