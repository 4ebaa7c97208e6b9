"""Modules of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from rlhf.plugins import absolute, load_modules

COUNTS = "import sys\nsys.plugin_runs = getattr(sys, 'plugin_runs', 0) + 1\n"


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`sys.plugin_runs` counts from 0, and what a test imports is forgotten."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "plugin_runs", 0, raising=False)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def plugin_runs() -> int:
    return vars(sys)["plugin_runs"]


def written(path: Path, text: str = COUNTS) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_is_imported_once_however_often_and_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    load_modules("algorithm.modules", [path, "mine.py", "./mine.py"])
    load_modules("rewards.modules", [path])
    assert plugin_runs() == 1


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    load_modules("algorithm.modules", [written(tmp_path / "a" / "mine.py"), written(tmp_path / "b" / "mine.py")])
    assert plugin_runs() == 2


def test_a_dotted_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a_plugin_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    load_modules("algorithm.modules", ["a_plugin_of_mine"])
    assert plugin_runs() == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("boom = 1 / 0\n", ["ZeroDivisionError", "boom = 1 / 0"]),
        ("def broken(:\n", ["SyntaxError", "def broken(:"]),
        ("import no_such_module_x\n", ["ModuleNotFoundError", "no_such_module_x"]),
    ],
)
def test_a_file_that_raises_is_told_with_its_key_and_the_authors_traceback(
    tmp_path: Path, text: str, told: list[str]
) -> None:
    path = written(tmp_path / "mine.py", text)
    with pytest.raises(ConfigError) as caught:
        load_modules("rewards.modules", [path])
    message = str(caught.value)
    assert f"rewards.modules = {path!r}: must be importable. " in message
    for part in [*told, "Fix the module or its path.", "Traceback (most recent call last)", "mine.py"]:
        assert part in message


@pytest.mark.parametrize("path", ["no_such_module_x", "/no/such/file.py"])
def test_what_is_not_there_is_told_with_its_key(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"algorithm\.modules = '{path}': must be importable\."):
        load_modules("algorithm.modules", [path])


def test_a_file_that_was_mended_is_imported_the_next_time(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.py", "1 / 0\n")
    with pytest.raises(ConfigError):
        load_modules("algorithm.modules", [path])
    written(tmp_path / "mine.py")
    load_modules("algorithm.modules", [path])
    assert plugin_runs() == 1


def test_a_config_error_of_the_module_is_passed_on_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.py", "from rlhf.errors import ConfigError\nraise ConfigError(['its own'])\n")
    with pytest.raises(ConfigError) as caught:
        load_modules("algorithm.modules", [path])
    assert caught.value.problems == ["its own"]


def test_paths_of_files_become_absolute_and_dotted_modules_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = absolute(["mine.py", "/there/yours.py", "package.module"])
    assert found == (str(tmp_path / "mine.py"), "/there/yours.py", "package.module")
    assert absolute(found) == found
