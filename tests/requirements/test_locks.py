"""The lock files hold exact pins that satisfy pyproject.toml, and the check of an environment sees what is wrong."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from requirements import verify

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned_versions(lock: Path) -> dict[str, str]:
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in verify.read_lock(lock)}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_line_of_a_lock_is_one_exact_pin_without_an_address(lock: Path) -> None:
    for pin in verify.read_lock(lock):
        operators = [specifier.operator for specifier in pin.specifier]
        assert operators in (["=="], ["==="]), pin
        assert pin.url is None
        assert "*" not in str(pin.specifier)


@pytest.mark.parametrize("environment", ["cpu", "gpu"])
def test_a_lock_satisfies_what_the_project_declares(environment: str) -> None:
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *extras[environment], *extras["dev"]]
    pins = pinned_versions(ROOT / f"requirements/{environment}.lock")
    assert [found for text in declared if (found := verify.fault(Requirement(text), pins))] == []


def test_the_two_locks_differ_in_no_dependency_that_the_project_declares() -> None:
    cpu, gpu = (pinned_versions(ROOT / f"requirements/{environment}.lock") for environment in ("cpu", "gpu"))
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]} - {"torch"}
    assert {name: cpu[name] for name in names} == {name: gpu[name] for name in names}


def test_the_cpu_lock_names_the_cpu_torch_and_the_gpu_lock_only_the_plain_one() -> None:
    cpu, gpu = (
        {pin.name: str(pin) for pin in verify.read_lock(ROOT / f"requirements/{environment}.lock")}
        for environment in ("cpu", "gpu")
    )
    assert cpu["torch"].endswith("+cpu")
    assert gpu["torch"].startswith("torch===")
    assert "+" not in gpu["torch"]


def test_packages_left_out_on_purpose_are_not_in_the_cpu_locks() -> None:
    pinned = {*pinned_versions(ROOT / "requirements/cpu.lock"), *pinned_versions(ROOT / "requirements/smollm2.lock")}
    assert pinned.isdisjoint(dependency for _, dependency in verify.LEFT_OUT)


def test_a_missing_package_and_a_wrong_version_are_faults() -> None:
    assert verify.fault(Requirement("ray==2.60.0"), {"ray": "2.60.0"}) is None
    assert verify.fault(Requirement("ray==2.60.0"), {"ray": "2.59.0"}) == "needs ray==2.60.0, but 2.59.0 is installed"
    assert verify.fault(Requirement("ray==2.60.0"), {}) == "needs ray==2.60.0, which is not installed"
