"""What a user sees for bad input. Every case stops before any process is started, and names the key, rule and fix."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import launch
from rlhf.console import RunConsole
from rlhf.errors import GroupwiseError

GOOD = {"messages": [{"role": "user", "content": "1+1=?"}], "answer": "2", "reward": "math"}


def message(*overrides: str) -> str:
    """The error of a run with these overrides, as the console shows it."""
    with initialize_config_dir(str(launch.CONF), version_base=None):
        raw = OmegaConf.to_container(compose("config", launch.force_value_overrides(overrides)), resolve=True)
    with pytest.raises(GroupwiseError) as caught:
        launch.run(raw, RunConsole(io.StringIO()))
    return str(caught.value)


@pytest.fixture
def jsonl(tmp_path: Path):
    """Writes records (or raw lines) to a file and returns the overrides that train on it."""

    def write(*records: object) -> tuple[str, ...]:
        path = tmp_path / "train.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(f"{line}\n" for line in lines))
        root = f"run_root={tmp_path / 'runs'}"
        return ("data=jsonl", "~stages.sft", root, f"data.train.path={path}", f"data.evaluation.path={path}")

    return write


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.rankz=2"], ["training.rankz", "training.ranks"]),
        (["lr=1e-4"], ["lr", "learning_rate"]),
        (["stages.rl.prompts_per_stepp=3"], ["stages.rl.prompts_per_stepp", "prompts_per_step"]),
        (["training.ranks=two"], ["training.ranks = 'two'", "integer"]),
        (["training.zero_stage=5"], ["training.zero_stage = 5", "1, 2"]),
        (["rollouts.temperature=0"], ["rollouts.temperature = 0"]),
        (["stages.rl.prompts_per_step=7", "stages.rl.updates_per_step=2"], ["stages.rl.prompts_per_step", "6", "8"]),
        (["rollouts.group_size=1"], ["rollouts.group_size = 1", "2"]),
        (["rollouts.top_p=0.9"], ["rollouts.top_p = 0.9"]),
        (["rollouts.top_k=20"], ["rollouts.top_k = 20"]),
        (["rollouts.max_completion_tokens=128"], ["rollouts.max_completion_tokens = 128", "model.max_context_tokens"]),
        (["evaluation.pass_at=[1,16]"], ["evaluation.pass_at", "evaluation.samples_per_prompt"]),
        (["rewards.components.maths={weight: 1.0}"], ["rewards.components.maths", "math"]),
        (["rewards.components.math.weight=0"], ["rewards.components", "weight"]),
        (["algorithm.name=grpo_icepopp"], ["algorithm.name = grpo_icepopp", "grpo_icepop"]),
        (["algorithm.clip_lowe=0.1"], ["algorithm.clip_lowe", "clip_low"]),
        (["algorithm.clip_low=1.5"], ["algorithm.clip_low = 1.5"]),
        (["weight_sync.transport=nccl"], ["weight_sync.transport = nccl", "cpu"]),
        (["cluster.placement=colocated"], ["cluster.placement = colocated"]),
        (["stages.rl.optimizer.warmup_steps=1000"], ["stages.rl.optimizer.warmup_steps = 1000", "100"]),
        (["data.train.families=[adition]"], ["adition", "addition"]),
        (["model=hf", "model.path=/no/such/model"], ["model.path = /no/such/model"]),
        (["model=hf"], ["model.path"]),
        (["min_free_disk_mib=999999999"], ["min_free_disk_mib", "free"]),
        (["run_root=/proc/nowhere"], ["run_root = /proc/nowhere"]),
        (["data=jsonl", "data.train.path=/no/file.jsonl", "data.evaluation.path=/no/file.jsonl"], ["/no/file.jsonl"]),
        (["rewards.modules=[no_such_module]"], ["no_such_module"]),
        (["model.heads=3"], ["model.hidden_size", "heads"]),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key_and_what_to_do(tmp_path, overrides, expected):
    text = message(f"run_root={tmp_path}", *overrides)
    for part in expected:
        assert part in text


def test_all_problems_are_reported_at_once():
    text = message("training.rankz=2", "rollouts.top_p=0.5", "evaluation.prompts=0")
    for key in ("training.rankz", "rollouts.top_p", "evaluation.prompts"):
        assert key in text


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("{not json", ["train.jsonl", "2"]),
        ({**GOOD, "answer": ""}, ["train.jsonl", "2", "answer"]),
        ({**GOOD, "messages": []}, ["train.jsonl", "2", "messages"]),
        ({**GOOD, "messages": [{"role": "assistant", "content": "2"}]}, ["train.jsonl", "2", "user"]),
        ({**GOOD, "messages": [{"content": "1+1=?"}]}, ["train.jsonl", "2", "role"]),
        ({"messages": GOOD["messages"], "answer": "2"}, ["train.jsonl", "2", "reward"]),
        ({**GOOD, "answer": 2.5j.imag and ["2"]}, ["train.jsonl", "2", "answer"]),
    ],
)
def test_a_malformed_record_is_reported_with_file_line_and_field(jsonl, record, expected):
    text = message(*jsonl(GOOD, record))
    for part in expected:
        assert part in text


def test_an_empty_file_is_refused(jsonl):
    assert "train.jsonl" in message(*jsonl())


def test_a_record_that_names_an_unknown_reward_is_refused(jsonl):
    text = message(*jsonl(GOOD, {**GOOD, "reward": "mth"}))
    assert "mth" in text
    assert "math" in text


def test_a_prompt_longer_than_the_context_is_refused_before_anything_starts(jsonl):
    long = {**GOOD, "messages": [{"role": "user", "content": "1+1+" * 60}]}
    text = message(*jsonl(GOOD, long))
    assert "prompt train:2" in text
    assert "model.max_context_tokens" in text


def test_sft_on_records_without_demonstrations_is_refused(jsonl):
    overrides = [argument for argument in jsonl(GOOD) if argument != "~stages.sft"]
    assert "completion" in message(*overrides)
