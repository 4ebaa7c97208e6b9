"""Reward functions can be imported and run without torch, Ray and vLLM; only the worker and its client need Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
{body}
"""


def run(body: str, *blocked: str) -> None:
    program = PROGRAM.format(blocked=set(blocked), body=body)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rewards_import_without_torch_ray_and_vllm() -> None:
    files = (ROOT / "rewards").glob("*.py")
    modules = [f"rewards.{path.stem}" for path in files if path.stem not in ("worker", "client", "__init__")]
    assert "rewards.scorer" in modules
    run(f"import {', '.join(modules)}", "torch", "ray", "vllm", "transformers", "deepspeed")


def test_a_reward_function_runs_without_even_numpy() -> None:
    body = "from rewards import math, RewardInput\nassert math.math(RewardInput.of('18', '18')).value == 1"
    run(body, "torch", "ray", "vllm", "numpy", "sympy", "math_verify", "pydantic")
