"""The newest TRL beside this program: same model, prompts, reward, group size, lengths, steps and precision.

TRL runs in an environment of its own, which is made here, with its plain trainer: with vLLM in the same process it
needs patches on a CPU, and the server mode needs NCCL. Each case first tries several settings of TRL for a step and
goes on with the fastest. This program runs one engine and one learner, at `max_staleness=1`. TRL's loss is GRPO on
fresh samples; ours is GRPO with IcePop's mask, because its samples are one version old.

`vs_trl_*` is trained samples per second over TRL's, without the first step. Memory is the highest sum over the
processes of a run, memory that they share counted once.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.isolated import REPOSITORY
from benchmarks.parts import RESULTS
from benchmarks.rollouts.runs import launch, step_lines, tiny_model, watched
from benchmarks.rollouts.vs_trl import workload
from rlhf.config import SmolLM2Model
from rlhf.models import prepare_model

HERE = Path(__file__).parent
ENVIRONMENT = REPOSITORY / ".venv-trl"
PICTURE = RESULTS / "vs_trl.png"


@dataclass(frozen=True, slots=True)
class TrlSettings:
    """How TRL divides the samples of a step, and in what precision it holds weights and computes."""

    micro_batch_rows: int
    weights: str
    autocast: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    prompts_per_step: int
    group_size: int
    max_completion_tokens: int
    context: int
    steps: int
    learning_rate: float
    dtype: str
    trl: tuple[TrlSettings, ...]

    @property
    def samples(self) -> int:
        return self.prompts_per_step * self.group_size


LONG_TAILED = Case(4, 4, 512, 640, 6, 5e-6, "float32", (TrlSettings(16, "float32"), TrlSettings(4, "float32")))
CASES = {
    "tiny": Case(32, 8, 48, 128, 60, 1e-4, "float32", (TrlSettings(256, "float32"), TrlSettings(64, "float32"))),
    "135m": LONG_TAILED,
    "135m_bfloat16": replace(
        LONG_TAILED, dtype="bfloat16", trl=(TrlSettings(4, "bfloat16"), TrlSettings(4, "float32", autocast=True))
    ),
}


def run(*, quick: bool, **_: Any) -> dict[str, Any]:
    """Both programs on all cases, or on the tiny one; draws their learning curves."""
    python, rows = trl_python(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if name == "tiny" or not quick:
                rows[name] = compare(python, name, case, Path(folder) / name)
        curves = {name: {who: row[who]["rewards"] for who in ("groupwise", "trl")} for name, row in rows.items()}
        subprocess.run([python, HERE / "picture.py", json.dumps(curves), PICTURE], check=True)
    return {"rows": rows, "figures": {f"vs_trl_{name}": row["speed_ratio"] for name, row in rows.items()}}


def compare(python: Path, name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Both programs on one case, one after the other."""
    folder.mkdir()
    prompts = folder / "prompts.jsonl"
    if name == "tiny":
        workload.write(prompts, workload.arithmetic(4096))
        model = tiny_model(folder / "sft")
    else:
        workload.write(prompts, workload.long_tailed(4096))
        model = prepare_model(SmolLM2Model(kind="smollm2_135m"), 0, folder)
    tried = [
        {**asdict(settings), "samples_per_s": trl(python, case, settings, 1, model, prompts)["samples_per_s"]}
        for settings in case.trl
    ]
    fastest = max(zip(tried, case.trl, strict=True), key=lambda pair: pair[0]["samples_per_s"])[1]
    theirs = trl(python, case, fastest, case.steps, model, prompts)
    ours = groupwise(case, model, prompts, folder)
    return {
        "speed_ratio": ours["samples_per_s"] / theirs["samples_per_s"],
        "memory_ratio": ours["peak_memory_gib"] / theirs["peak_memory_gib"],
        "groupwise": ours,
        "trl": theirs,
        "trl_settings_tried": tried,
    }


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_python() -> Path:
    """The interpreter of an environment with the newest TRL, made if it is missing, with this one's torch."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".made").exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        packages = ["trl", f"torch=={torch.__version__.split('+')[0]}", "matplotlib"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (ENVIRONMENT / ".made").touch()
    return python


def trl(python: Path, case: Case, settings: TrlSettings, steps: int, model: Path, prompts: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            **asdict(case),
            **asdict(settings),
            "steps": steps,
            "model": str(model),
            "prompts": str(prompts),
            "reward": str(HERE / "reward.py"),
            "folder": folder,
            "seed": 0,
        }
        output, peak = watched([str(python), str(HERE / "trl_process.py"), json.dumps(spec)])
    found = json.loads(output.split("RESULT ", 1)[1].splitlines()[0])
    tokens = lengths(found.pop("lengths"))
    return found | speed(found["ends_s"], tokens["completion_tokens_mean"], case) | tokens | {"peak_memory_gib": peak}


# --- this program -----------------------------------------------------------------------------------------------------


def groupwise(case: Case, model: Path, prompts: Path, folder: Path) -> dict[str, Any]:
    columns = "{messages: prompt, answer: answer, metadata: [ends]}"
    source = (
        f"{{kind: jsonl, path: {prompts}, columns: {columns}, reward: reward, answer_pattern: null, shuffle: false}}"
    )
    peak = launch(
        "experiment=algorithms_online",
        "algorithm=grpo_icepop",
        "+algorithm.group_filter=none",
        "data=jsonl",
        f"data.train={source}",
        f"data.evaluation={source}",
        "~rewards.components.math",
        f"+rewards.components.reward={{path: {HERE / 'reward.py'}:reward, style: trl}}",
        f"model.path={model}",
        f"model.dtype={case.dtype}",
        f"model.max_context_tokens={case.context}",
        f"rollouts.group_size={case.group_size}",
        f"rollouts.max_completion_tokens={case.max_completion_tokens}",
        "+rollouts.max_staleness=1",
        "training.ranks=1",
        f"stages.rl.steps={case.steps}",
        f"stages.rl.prompts_per_step={case.prompts_per_step}",
        f"stages.rl.optimizer={{learning_rate: {case.learning_rate}, warmup_steps: 0}}",
        "++evaluation.prompts=8",
        "++evaluation.samples_per_prompt=1",
        "++evaluation.pass_at=[1]",
        "tracking=local",
        f"run_root={folder / 'rl'}",
    )
    lines = step_lines(folder / "rl")
    mean = fmean(line["trained/completion_tokens"] for line in lines)
    return {
        "rewards": [line["trained/reward_mean"] for line in lines],
        "ends_s": [line["time_s"] - lines[0]["time_s"] for line in lines],
        "completion_tokens_mean": mean,
        "peak_memory_gib": peak,
    } | speed([line["time_s"] for line in lines], mean, case)


# --- measuring --------------------------------------------------------------------------------------------------------


def speed(ends_s: Sequence[float], tokens: float, case: Case) -> dict[str, float]:
    """Trained samples per second, and tokens at so many a sample, without the first step of several.

    `ends_s`: when each step ended, in seconds since training began.
    """
    first, *others = ends_s
    seconds = (others[-1] - first) / len(others) if others else first
    return {"samples_per_s": case.samples / seconds, "tokens_per_s": tokens * case.samples / seconds}


def lengths(tokens: Sequence[int]) -> dict[str, float]:
    """How long the completions were."""
    ordered = sorted(tokens)
    return {
        "completion_tokens_mean": sum(ordered) / len(ordered),
        "completion_tokens_median": ordered[len(ordered) // 2],
        "completion_tokens_max": ordered[-1],
        "below_64_tokens": sum(length < 64 for length in ordered) / len(ordered),
    }
