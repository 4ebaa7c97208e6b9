"""What a user sees for bad input. A case stops before any process is started, unless marked, and names what to do."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import launch
from rlhf.config import RunConfig
from rlhf.console import RunConsole
from rlhf.errors import GroupwiseError
from rlhf.runtime.interrupts import Interrupts

GOOD = {"messages": [{"role": "user", "content": "1+1=?"}], "answer": "2", "reward": "math"}


def not_refused(*_: object) -> None:
    raise AssertionError("the input was not refused before the start")


@pytest.fixture(autouse=True)
def nothing_is_started(request, monkeypatch):
    if "integration" not in request.keywords:
        monkeypatch.setattr(launch, "Cluster", not_refused)


def run(*overrides: str) -> str:
    """What the console shows of a run with these overrides."""
    given = launch.force_value_overrides(overrides)
    with initialize_config_dir(str(launch.CONF), version_base=None):
        raw = OmegaConf.to_container(compose("config", given), resolve=True)
    shown = io.StringIO()
    launch.run(raw, RunConsole(shown), Interrupts(print), given)
    return shown.getvalue()


def message(*overrides: str) -> str:
    """The error of a run with these overrides, as the console shows it."""
    with pytest.raises(GroupwiseError) as caught:
        run(*overrides)
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
        (["algorithm=agapo", "rollouts.max_staleness=1"], ["rollouts.max_staleness = 1", "agapo", "tis_sequence"]),
        (
            ["algorithm=grpo", "algorithm.kl.estimator=k1"],
            ["algorithm.kl.estimator", "k1"],
        ),
        (["algorithm=dpo"], ["algorithm.name = dpo", "trains on rollouts"]),
        (["algorithm=gspo", "algorithm.correction.kind=icepop"], ["algorithm.correction.kind = 'icepop'", "Gspo"]),
        (["algorithm.correction.kind=icepopp"], ["algorithm.correction.kind = icepopp", "icepop?"]),
        (["algorithm.modules=[no_such_module]"], ["algorithm.modules", "no_such_module", "importable"]),
        (
            ["stages.easy={kind: filter, samples_per_prompt: 4, drop_at_least: 5}"],
            ["stages.easy.drop_at_least = 5", "samples_per_prompt = 4"],
        ),
        (
            ["stages.easy={kind: filter, samples_per_prompt: 4, drop_at_least: 2, drop_at_most: 1}"],
            ["stages.easy.drop_at_most = 1", "Every prompt would be dropped"],
        ),
        (["stages.rl.data={kind: jsonl, path: /no/file.jsonl}"], ["/no/file.jsonl"]),
        (["stages.rl.data={kind: jsonll, path: x}"], ["stages.rl.data.kind = jsonll", "Did you mean jsonl?"]),
        (["stages.rl.kind=rll"], ["stages.rl.kind = rll", "collect, filter, preference, rl, sft"]),
        (
            ["training.token_budget=100"],
            ["training.token_budget = 100", "model.max_context_tokens = 128", "128 or more"],
        ),
        (["training.token_budget=0"], ["training.token_budget = 0", "integer >= 1"]),
        (["training.micro_batch_size=8"], ["training.micro_batch_size = 8", "is not a key of training"]),
        (["training.packing=true"], ["training.packing = true", "is not a key of training"]),
        (["model.attention=eager"], ["model.attention = 'eager'", "is not a key of model"]),
        (
            ["training.zero_stage=1", "training.offload_optimizer=true"],
            ["training.offload_optimizer", "zero_stage to 2"],
        ),
        (["training.offload_parameters=true"], ["training.offload_parameters", "zero_stage to 3"]),
        (["rollouts.engine_args={dtype: float16}"], ["rollouts.engine_args.dtype = float16", "Set model.dtype"]),
        (["rollouts.engine_args={worker_extension_cls: x}"], ["rollouts.engine_args.worker_extension_cls", "Remove"]),
        (["rollouts.engine_args={block-size: 16}"], ["rollouts.engine_args.block-size", "Write block_size"]),
        (["rollouts.pipeline_depth=3", "algorithm=grpo"], ["rollouts.pipeline_depth = 3", "max_staleness + 1 = 1"]),
        (["rollouts.late_groups=abort"], ["rollouts.late_groups = abort", "max_staleness of 1 or more"]),
        (["rollouts.late_groups=drop"], ["rollouts.late_groups = 'drop'", "wait, mask, abort"]),
        (["weight_sync.kv_cache=clear"], ["weight_sync.kv_cache = 'clear'", "recompute, keep"]),
        (["weight_sync.clear_kv_cache=true"], ["weight_sync.clear_kv_cache", "is not a key of weight_sync"]),
        (["rollouts.prefix_caching=false"], ["rollouts.prefix_caching", "is not a key of rollouts"]),
        (
            ["model.max_context_tokens=10000000"],
            ["rollouts.kv_cache_gib = 1", "model.max_context_tokens = 10000000", "Set it to", "lower the context"],
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key_and_what_to_do(tmp_path, overrides, expected):
    text = message(f"run_root={tmp_path}", *overrides)
    for part in expected:
        assert part in text


def model_directory(path: Path) -> Path:
    """A model in two shards, as a user would point `model.path` at it."""
    from rlhf.config import Exaone4TinyModel
    from rlhf.models import load_policy, prepare_model

    tiny = prepare_model(Exaone4TinyModel(kind="exaone4_tiny", layers=4), 0, path / "tiny")
    load_policy(tiny, "float32").save_pretrained(path / "model", max_shard_size="1500KB")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, path / "model")
    shutil.copy(tiny / "chat_template.jinja", path / "model")
    return path / "model"


def lose_a_shard(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[-1].unlink()


def truncate_a_shard(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])


def promise_a_tensor(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.77.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def break_the_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{")


def leave_pickled_weights(model: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    (model / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lose_a_shard, ["which does not exist", "Download it again"]),
        (truncate_a_shard, ["cannot be read", "truncated or damaged"]),
        (promise_a_tensor, ["model.layers.77.mlp.up_proj.weight", "download both again"]),
        (break_the_index, ["must have a readable index", "Download it again"]),
        (leave_pickled_weights, ["only pickled weights", "save_pretrained"]),
    ],
)
def test_a_damaged_model_is_refused_before_anything_starts(tmp_path, damage, expected):
    model = model_directory(tmp_path)
    damage(model)
    text = message(f"run_root={tmp_path / 'runs'}", "model=hf", f"model.path={model}", "model.max_context_tokens=128")
    for part in [f"model.path = {model}", *expected]:
        assert part in text


OFFLINE = ("experiment=algorithms_offline", "model=exaone4_tiny", "model.max_context_tokens=128")
OPTIMIZER = "optimizer: {learning_rate: 1e-5}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.preference.data=colect"], ["stages.preference.data = colect", "Did you mean collect?"]),
        (
            [
                f"stages={{preference: {{kind: preference, data: later, {OPTIMIZER}}}, later: {{kind: collect}}}}",
                "~stages.collect",
            ],
            ["stages.preference.data = later", "earlier stage of kind collect", "Earlier ones: none"],
        ),
        (["algorithm=grouper"], ["stages.collect.produce = pairs", "must be groups", "grouper"]),
        (["stages.collect.produce=groups"], ["stages.collect.produce = groups", "must be pairs", "dpo"]),
        (["algorithm=grpo"], ["algorithm.name = grpo", "dpo, simper or grouper"]),
        (
            ["stages.preference.algorithm={name: dpo, betta: 1}"],
            ["stages.preference.algorithm.betta", "Did you mean stages.preference.algorithm.beta?"],
        ),
        (["stages.preference.steps=3"], ["stages.preference.steps = 3", "stages.preference.epochs?"]),
        (["stages.preference.data=5"], ["stages.preference.data = 5", "text or a mapping"]),
        (
            ["stages.preference.data={kind: jsonl, path: /no/pairs.jsonl}", "~stages.collect"],
            ["/no/pairs.jsonl"],
        ),
        (
            ["stages.collect.reuse=preference", "stages.collect.reuse_fraction=0.5"],
            ["stages.collect.reuse = preference"],
        ),
    ],
)
def test_a_wrong_preference_stage_is_refused_with_its_key_and_what_to_do(tmp_path, overrides, expected):
    text = message(f"run_root={tmp_path}", *OFFLINE, *overrides)
    for part in expected:
        assert part in text
    assert "Value error" not in text


PAIR = {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}
GROUP = {"prompt": "1+1=?", "completions": ["2", "3"], "rewards": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("{not json", ["preferences.jsonl", "2"]),
        ({"prompt": "1+1=?", "chosen": "2"}, ["preferences.jsonl", "2", "rejected"]),
        ({**PAIR, "chosen": 2}, ["preferences.jsonl", "2", "chosen"]),
        ({**GROUP, "rewards": [1.0]}, ["preferences.jsonl", "2", "rewards"]),
        (GROUP, ["preferences.jsonl", "2"]),
        ({**PAIR, "rejected": "3" * 200}, ["model.max_context_tokens"]),
    ],
    ids=["json", "missing", "kind", "lengths", "group", "long"],
)
def test_a_malformed_preference_record_is_refused_before_anything_starts(tmp_path, record, expected):
    path = tmp_path / "preferences.jsonl"
    lines = [json.dumps(PAIR), record if isinstance(record, str) else json.dumps(record)]
    path.write_text("".join(f"{line}\n" for line in lines))
    text = message(
        f"run_root={tmp_path / 'runs'}",
        *OFFLINE,
        "~stages.collect",
        f"stages.preference.data={{kind: jsonl, path: {path}}}",
    )
    for part in expected:
        assert part in text


def test_a_module_of_the_users_that_raises_is_shown_with_the_authors_traceback(tmp_path):
    path = tmp_path / "my_algorithm.py"
    path.write_text("scale = 1 / 0\n")
    text = message(f"run_root={tmp_path / 'runs'}", f"algorithm.modules=[{path}]")
    for part in ("algorithm.modules", "must be importable", "my_algorithm.py", "scale = 1 / 0", "ZeroDivisionError"):
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


# --- a run that is resumed --------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run that ended before its first checkpoint; its seed is 5 and its steps are 77."""
    with initialize_config_dir(str(launch.CONF), version_base=None):
        raw = OmegaConf.to_container(compose("config", ["seed=5", "stages.rl.steps=77"]), resolve=True)
    path = tmp_path / "20260101-000000-quickstart-abcdef"
    path.mkdir()
    launch.write_config(RunConfig.model_validate(raw), path)
    return path


def test_a_resumed_run_has_its_own_configuration(unfinished: Path) -> None:
    plan = run(f"resume={unfinished}", "dry_run=true")
    assert re.search(r"seed +5 *\n", plan)
    assert re.search(r"steps +77 *\n", plan)


def test_a_run_cannot_be_resumed_as_another_one(unfinished: Path) -> None:
    found = message(f"resume={unfinished}", "seed=5", "stages.rl.steps=78")
    assert "stages.rl.steps = 78: must be 77, as in the run that is resumed." in found
    assert "seed" not in found
    assert "Did you mean 20260101-000000-quickstart-abcdef?" in message(
        "resume=20260101-000000-quickstart-abcdeg", f"run_root={unfinished.parent}"
    )
