"""The import contract, read off the source, and the configurations that ship."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PACKAGES = ("rlhf", "rewards", "rollouts", "benchmarks")
FILES = ["launch.py", *sorted(str(path.relative_to(ROOT)) for p in PACKAGES for path in (ROOT / p).rglob("*.py"))]

ONLY_IN = {
    "ray": ("*/worker.py", "rewards/client.py", "rlhf/cluster.py", "launch.py", "benchmarks/*.py"),
    "deepspeed": ("rlhf/training/deepspeed_engine.py", "rlhf/training/zero_model.py"),
    "vllm": (
        "rollouts/vllm_engine.py",
        "rollouts/weight_receiver.py",
        "rlhf/weight_sync/transports.py",
        "benchmarks/rollouts/weight_sync.py",
    ),
    "wandb": ("rlhf/tracking.py",),
    # A benchmark composes the runs that it starts.
    "hydra": ("launch.py", "benchmarks/*.py"),
    "omegaconf": ("launch.py", "benchmarks/*.py"),
}
NEVER = [("rlhf", "rollouts"), ("rlhf", "rewards"), ("rollouts", "rewards"), ("rewards", "rollouts")]
NEVER += [("rewards", "torch"), *((package, "launch") for package in PACKAGES)]
NEVER += [(package, "benchmarks") for package in PACKAGES if package != "benchmarks"]
WITH_RAY = (".worker", "rewards.client")
FORMULAS = ("rlhf/advantages", "rlhf/losses")


# --- imports ----------------------------------------------------------------------------------------------------------


@cache
def imports(file: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in `file`, also inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            found += [(node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant)]
    return found


def breaches(package: str, allowed: tuple[str, ...]) -> Iterator[str]:
    for file in FILES:
        for line, module in imports(file):
            if module.split(".")[0] == package and not any(fnmatch(file, pattern) for pattern in allowed):
                yield f"{file}:{line} imports {module}"


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 40
    assert {str(Path(file).parent) for file in FILES} >= {"rlhf/stages", "rlhf/algorithms", "benchmarks", "rollouts"}
    assert any(module.startswith("ray") for _, module in imports("rlhf/cluster.py"))


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_only_in_the_files_that_own_it(package: str) -> None:
    assert list(breaches(package, ONLY_IN[package])) == []


@pytest.mark.parametrize("pattern", sorted({pattern for patterns in ONLY_IN.values() for pattern in patterns}))
def test_no_exception_to_the_contract_is_out_of_date(pattern: str) -> None:
    assert any(fnmatch(file, pattern) for file in FILES)


@pytest.mark.parametrize(("importer", "imported"), NEVER)
def test_a_package_does_not_know_those_beside_and_above_it(importer: str, imported: str) -> None:
    elsewhere = tuple(sorted({f"{file.split('/')[0]}/*" for file in FILES if "/" in file} - {f"{importer}/*"}))
    assert list(breaches(imported, (*elsewhere, "launch.py"))) == []


def test_a_formula_imports_torch_and_other_formulas_alone() -> None:
    known = {"torch", "__future__", "math", "typing", "collections", "dataclasses", "functools"}
    strange = [
        f"{file}:{line} imports {module}"
        for file in FILES
        if file.startswith(FORMULAS)
        for line, module in imports(file)
        if module.split(".")[0] not in known and not module.startswith(("rlhf.advantages", "rlhf.losses"))
    ]
    assert strange == []


def module_names(prefix: str) -> list[str]:
    # What runs inside the sandbox finds its neighbours as top-level modules: it is no part of the package there.
    files = [file for file in FILES if file.startswith(prefix) and "/inside/" not in file]
    return [file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in files]


BLOCKED_PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
import {modules}
"""


@pytest.mark.parametrize(
    ("prefixes", "blocked"),
    [
        (FORMULAS, {"ray", "deepspeed", "vllm", "wandb", "hydra", "omegaconf", "transformers", "pydantic"}),
        (("rlhf/algorithms",), {"ray", "deepspeed", "vllm", "wandb", "hydra", "omegaconf", "transformers"}),
        (("rewards",), {"torch", "deepspeed", "vllm", "wandb", "hydra", "transformers", "ray"}),
    ],
    ids=["formulas", "algorithms", "rewards"],
)
def test_what_is_light_can_be_imported_without_what_is_heavy(prefixes: tuple[str, ...], blocked: set[str]) -> None:
    modules = [name for prefix in prefixes for name in module_names(prefix) if not name.endswith(WITH_RAY)]
    program = BLOCKED_PROGRAM.format(blocked=blocked, modules=", ".join(modules))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- configurations ---------------------------------------------------------------------------------------------------


def composed(*overrides: str) -> dict[str, Any]:
    """What launch.py would validate, with a placeholder for each value that a user must give (`???`)."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("config", overrides=list(overrides))
    for key in missing(OmegaConf.to_container(config, resolve=False)):
        OmegaConf.update(config, key, "given-by-the-user")
    raw = OmegaConf.to_container(config, resolve=True)
    assert isinstance(raw, dict)
    return raw


def missing(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose value is `???`."""
    if isinstance(node, dict):
        return [key for name, value in node.items() for key in missing(value, f"{prefix}.{name}".lstrip("."))]
    return [prefix] if node == "???" else []


@cache
def check(*overrides: str) -> Any:
    from rewards import registry
    from rlhf.validation import validate

    return validate(composed(*overrides), reward_names=registry.names())


def experiment_of(option: str) -> list[str]:
    """An experiment that the option of a config group is for, with what the user of the option has to give."""
    from rlhf import algorithms
    from rlhf.algorithms.page import default_needs

    group, _, name = option.partition("=")
    if group == "algorithm":
        data = default_needs(algorithms.algorithm(name)).data
        if data in ("pairs", "groups"):
            return ["experiment=algorithms_offline", f"++stages.collect.produce={data}"]
    return ["experiment=quickstart", *(["model.max_context_tokens=256"] if name == "smollm2_135m" else [])]


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment"
)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_validates(experiment: str) -> None:
    assert check(f"experiment={experiment}").experiment


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_a_config_group_fits_an_experiment_of_its_kind(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert check(*experiment_of(option), option)


def test_every_algorithm_has_an_option_of_its_name_except_the_one_that_sft_stages_take() -> None:
    from rlhf import algorithms

    options = {path.stem for path in (CONF / "algorithm").glob("*.yaml")}
    assert options == set(algorithms.names()) - {"sft"}


def test_one_option_gives_a_reward_that_asks_a_model_a_server_of_the_run() -> None:
    judged = check("experiment=quickstart_judge", "servers=judge")
    assert judged.rewards.components["judge"].params["endpoint"]["server"] == "judge"
    assert judged.servers["judge"].kind == "chat"
    hybrid = check("experiment=exaone4", "rewards=hybrid_preference", "servers=reward_model")
    assert hybrid.rewards.components["preference"].applies == "always"
    both = check("experiment=quickstart_judge", "servers=[judge,reward_model]")
    assert set(both.servers) == {"judge", "reward_model"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_configuration_a_run_writes_down_is_valid_again(experiment: str) -> None:
    from rlhf.validation import validate

    config = check(f"experiment={experiment}")
    assert validate(config.model_dump(mode="json")) == config


def test_there_is_a_config_group_for_every_section_of_the_run_config() -> None:
    from rlhf.config import RunConfig, Section

    sections = {"algorithm", "servers"}  # a section that is open for keys of its own, and one of named entries
    for name, field in RunConfig.model_fields.items():
        one_of_several = field.discriminator is not None
        if one_of_several or (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            sections.add(name)
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert sections == groups - {"experiment"}
