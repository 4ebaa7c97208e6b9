"""The documentation page of the algorithms: complete, up to date, and what the command line prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from rlhf.algorithms import names, page, registry
from rlhf.algorithms.__main__ import main
from rlhf.algorithms.base import Data
from rlhf.algorithms.kl import Estimator, Kl, Placement
from rlhf.errors import ConfigError
from rlhf.losses.reduce import Reduction
from rlhf.mismatch import mismatch_gaps
from rlhf.selection import GroupFilter
from tests.rlhf.toy_world import batch_for, built

ROOT = Path(__file__).resolve().parents[2]
METRIC = re.compile(r'"((?:rollout|reward|trained|advantage|staleness|policy|optim|sync|perf|mismatch)/[a-z_]+)"')

every_name = pytest.mark.parametrize("name", names())


def slug(heading: str) -> str:
    """The anchor that Markdown viewers make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_page_in_docs_is_the_one_that_the_code_makes() -> None:
    mend = "docs/algorithms.md is not what the code says: run `make docs` (python -m rlhf.algorithms --write)"
    assert page.FILE.exists() and page.FILE.read_text() == page.page(), mend


def test_every_registered_algorithm_has_a_section_and_a_line_in_the_overview() -> None:
    text = page.page()
    for name in names():
        assert f"\n## {name}\n" in text
        assert f"\n| [`{name}`](#{name}) |" in text


@every_name
def test_a_section_says_the_formula_the_source_and_every_deviation(name: str) -> None:
    text, about = page.section(name), registry.algorithm(name).about
    for part in (about.title, about.formula, about.source, *about.deviations, *about.metrics, *about.metrics.values()):
        assert part in text


@every_name
def test_every_field_is_in_the_section_or_in_one_that_the_section_links_to(name: str) -> None:
    kind, text = registry.algorithm(name), page.section(name)
    linked = [family for family, title in page.FAMILIES if f"(#{slug(title)})" in text]
    shared = {field for family in linked for field in page.own_fields(family)}
    assert all(f"\n| `{field}` |" in text or field in shared for field in kind.model_fields)


@every_name
def test_every_field_says_what_it_means(name: str) -> None:
    kind = registry.algorithm(name)
    assert [field for field in kind.model_fields if not page._description(kind, field)] == []


@every_name
def test_a_default_that_differs_from_the_family_is_in_the_section(name: str) -> None:
    kind = registry.algorithm(name)
    for family, _ in page.FAMILIES:
        for field, described in family.model_fields.items() if issubclass(kind, family) else ():
            if kind.model_fields[field].default != described.default and field not in page.own_fields(kind):
                # The section of a nearer family has it.
                assert any(field in page.own_fields(f) for f, _ in page.FAMILIES[1:] if issubclass(kind, f))


def test_every_link_within_the_page_has_a_heading() -> None:
    text = page.page()
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_every_row_of_a_table_has_as_many_cells_as_its_header() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", page.page(), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_the_gradients_are_those_of_every_kl_that_is_accepted() -> None:
    combinations = {(e, p) for e in get_args(Estimator) for p in get_args(Placement)}
    setting = {"coefficient": 0.1}
    accepted = {(e, p) for e, p in combinations if not page._problems(Kl, setting | {"estimator": e, "placement": p})}
    assert accepted == set(page.GRADIENTS)
    assert set(page.ESTIMATORS) == set(get_args(Estimator))
    assert page.page().count("refused: ") == len(combinations - accepted)


def test_every_correction_reduction_filter_and_kind_of_data_is_described() -> None:
    text = page.page()
    assert {"none", "icepop", "tis_token"} <= set(page.corrections())
    assert all(f"\n### correction: {kind}\n" in text for kind in page.corrections())
    assert set(page.REDUCTIONS) == set(get_args(Reduction))
    assert set(page.FILTERS) == set(get_args(GroupFilter))
    assert set(page.TRAINS_ON) == set(get_args(Data))


@pytest.mark.parametrize("file", ["rlhf/controller.py", "rlhf/selection.py", "rlhf/training/learner.py"])
def test_every_metric_that_is_written_in_the_loop_is_described(file: str) -> None:
    described = page._metrics()
    found = set(METRIC.findall((ROOT / file).read_text()))
    assert found, "nothing to check"
    assert sorted(name for name in found if f"`{name}`" not in described) == [], "add them to METRICS of page.py"


def test_every_figure_of_the_mismatch_is_described_and_the_fresh_ones_have_the_same_names() -> None:
    gaps = mismatch_gaps(batch_for(built("grpo")))  # type: ignore[arg-type]
    overall, fresh = ({name.removeprefix(f"{prefix}/") for name in values} for prefix, (values, _) in gaps.items())
    described = page._metrics()
    assert all(f"`mismatch/{name}`" in described for name in overall)
    assert fresh == overall
    assert "`mismatch/fresh/<name>`" in described


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_module_prints_the_page_or_the_sections_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == page.page()
    assert main(["grpo", "sft"]) == 0
    assert capsys.readouterr().out == f"{page.section('grpo')}\n\n{page.section('sft')}\n"


def test_an_unknown_name_ends_with_the_nearest_one_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grop"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "Did you mean grpo?" in printed.err


def test_write_replaces_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.algorithms.__main__.FILE", tmp_path / "algorithms.md")
    assert main(["--write"]) == 0
    assert (tmp_path / "algorithms.md").read_text() == page.page()


def test_the_section_of_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match="algorithm = grop"):
        page.section("grop")


@pytest.mark.parametrize("arguments", [["--help", "algorithm=grpo"], ["algorithm.name=grpo", "-h", "x.y=1"]])
def test_help_with_an_algorithm_asks_for_its_section(arguments: list[str]) -> None:
    assert page.help_for(arguments) == page.section("grpo")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["algorithm=grpo"], ["--help", "algorithm=grop"], ["--help", "="]]
)
def test_other_arguments_ask_for_no_section(arguments: list[str]) -> None:
    assert page.help_for(arguments) is None


def test_the_help_of_launch_py_says_what_it_is_and_lists_groups_and_examples() -> None:
    command = [sys.executable, "launch.py", "--help", "algorithm=grpo_icepop", "rollouts.group_size=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for expected in ("Groupwise: SFT", "experiment: ", "quickstart", "dry_run=true", "python -m rlhf.algorithms NAME"):
        assert expected in done.stdout
    assert page.section("grpo_icepop") in done.stdout
