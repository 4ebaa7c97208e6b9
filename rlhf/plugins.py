"""Modules of the user's own, named in the config: importing one registers what it holds."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from rlhf.errors import ConfigError


def load_modules(key: str, paths: Iterable[str]) -> None:
    """Import dotted modules and `.py` files; a file is imported once. `key` is where the config names them.

    Raises ConfigError with the author's traceback when one cannot be imported.
    """
    for path in paths:
        load_module(key, path)


def load_module(key: str, path: str) -> ModuleType:
    """The module at `path`, a dotted name or a `.py` file. Raises ConfigError as `load_modules` does."""
    try:
        return _load_file(Path(path).resolve()) if path.endswith(".py") else importlib.import_module(path)
    except ConfigError:
        raise
    except Exception as error:
        detail = "".join(traceback.format_exception(error))
        raise ConfigError(
            [f"{key} = {path!r}: must be importable. {error!r}. Fix the module or its path.\n{detail}"]
        ) from error


def absolute(paths: Iterable[str]) -> tuple[str, ...]:
    """The same modules with the paths of files made absolute, for processes that run in another folder."""
    return tuple(str(Path(path).resolve()) if path.endswith(".py") else path for path in paths)


def _load_file(path: Path) -> ModuleType:
    name = f"plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
