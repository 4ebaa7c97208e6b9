"""GRPO with TRL's own trainer, as one JSON argument says. For an environment that has TRL: imports nothing of ours.

Prints `RESULT` and a JSON object: for each step its mean reward and the seconds since training began, and the lengths
of the completions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import Any

import torch
import transformers
import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.started = time.monotonic()
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.monotonic() - self.started)


def main(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(os.cpu_count() or 1)
    loaded = importlib.util.spec_from_file_location("reward", spec["reward"])
    assert loaded is not None and loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **given: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return list(module.reward(**given))

    samples = spec["prompts_per_step"] * spec["group_size"]
    rows = spec["micro_batch_rows"]
    clock = Clock()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["weights"]),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=spec["folder"],
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=samples // rows,
            num_generations=spec["group_size"],
            max_completion_length=spec["max_completion_tokens"],
            max_steps=spec["steps"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant",
            loss_type="grpo",
            beta=0.0,
            bf16=spec["autocast"],
            gradient_checkpointing=False,
            use_cpu=True,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=spec["seed"],
            chat_template_kwargs={"enable_thinking": True},  # where the template knows it
        ),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        train_dataset=load_dataset("json", data_files=spec["prompts"], split="train", cache_dir=spec["folder"]),
        callbacks=[clock],
    )
    trainer.train()
    return {
        "rewards": [line["reward"] for line in trainer.state.log_history if "reward" in line],
        "ends_s": clock.ends,
        "lengths": lengths,
        "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
