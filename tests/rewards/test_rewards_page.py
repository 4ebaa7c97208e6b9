"""docs/rewards.md: its files are written down and its commands are run, in their order, as a reader would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from rewards.foreign import Foreign, register
from rewards.parameter_groups import built
from rewards.preference import ModelEndpoint
from rlhf.config import RewardsConfig, ServerConfig
from rlhf.servers import asked, with_placeholders

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, _, text in BLOCKS if kind == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    for _, name, text in BLOCKS:
        if name:
            (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def outputs(folder: Path) -> dict[str, str]:
    """The output of each command of the page. They are independent of each other, so two run at a time."""
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(COMMANDS, threads.map(lambda command: run(folder, command), COMMANDS), strict=True))


def run(folder: Path, command: str) -> str:
    words = [sys.executable, *command.split()[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def values(output: str) -> list[float | None]:
    return [json.loads(line)["value"] for line in output.splitlines()]


def command(*parts: str) -> str:
    (found,) = (line for line in COMMANDS if all(part in line for part in parts))
    return found


def test_the_page_has_the_files_and_commands_that_are_tested() -> None:
    assert {name for _, name, _ in BLOCKS if name} == {
        "my_rewards.py", "examples.jsonl", "trl_rewards.py", "verl_rewards.py", "openrlhf_rewards.py", "rows.jsonl",
    }  # fmt: skip
    assert len(COMMANDS) == 6
    assert all(line.startswith("python -m rewards ") for line in COMMANDS)


def test_the_reward_of_the_page_is_fit_to_train_against(outputs: dict[str, str]) -> None:
    assert "unit_answer: fit to train against" in outputs[command("rewards test")]


def test_it_scores_the_examples_with_its_parameter(outputs: dict[str, str]) -> None:
    assert values(outputs[command("score unit_answer")]) == [1.0, 0.25, 0.0, None]


def test_show_says_what_it_reads_and_takes(outputs: dict[str, str]) -> None:
    page = outputs[command("rewards show")]
    assert "reads metadata: unit" in page
    assert "partial: float = 0.5" in page


@pytest.mark.parametrize(("style", "expected"), [("trl", [0.0, 1.0]), ("verl", [1.0, 0.0]), ("openrlhf", [1.0, 0.0])])
def test_functions_of_other_trainers_run_as_the_page_says(
    outputs: dict[str, str], style: str, expected: list[float]
) -> None:
    assert values(outputs[command(f"--style {style}")]) == expected


def test_the_configurations_of_the_page_are_valid() -> None:
    texts = [yaml.safe_load(text) for kind, _, text in BLOCKS if kind == "yaml"]
    own, elsewhere, served = [RewardsConfig.model_validate(text["rewards"]) for text in texts]
    assert own.components["format"].gate == "routed"
    assert not list(asked(elsewhere))
    server = {name: ServerConfig.model_validate(one) for name, one in texts[2]["servers"].items()}["scores"]
    assert [one.server for one in asked(served)] == ["scores"] and server.kind == "reward_model"
    endpoint = with_placeholders(served, {"scores": server}).components["preference"].params["endpoint"]
    for given in (endpoint, elsewhere.components["preference"].params["endpoint"]):
        assert built(ModelEndpoint, "endpoint", given).model == "org/reward-model"


def test_the_one_line_components_of_the_page_are_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (line,) = re.findall(r"rewards\.components\.gsm=(\{.*?\})", PAGE)
    register(Foreign("gsm_of_the_page", **yaml.safe_load(line)))
