"""Weight sync of the real stack: seconds, and the pause of generation beside vLLM's bare reload of the same weights.

With `--baseline`, short runs of both checkouts say how much faster a sync has become.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.isolated import REPOSITORY, isolated
from benchmarks.rollouts.runs import launch, step_lines
from rlhf.cluster import Cluster, roles
from rlhf.config import RunConfig
from rlhf.models import prepare_model
from rlhf.training.worker import RayLearnerGroup
from rlhf.vllm_environment import vllm_environment
from rlhf.weight_sync.publisher import WeightPublisher
from rollouts.vllm_engine import complete_settings, engine_settings
from rollouts.worker import RayEngines

MODELS: dict[str, dict[str, Any]] = {
    "0.66m": {"kind": "exaone4_tiny"},
    "135m": {"kind": "smollm2_135m"},
    "0.5b": {
        "kind": "exaone4_tiny",
        "hidden_size": 1536,
        "intermediate_size": 4608,
        "layers": 18,
        "heads": 24,
        "kv_heads": 8,
        "dtype": "bfloat16",  # in float32 two engines, two learners and the copies between them take over 24 GiB
    },
}
LAYOUTS = ((1, 1), (2, 1), (1, 3), (2, 3))
"""(engines, ZeRO stage); two learner ranks."""
SYNCS = 5


def run(*, quick: bool, baseline: Path | None, **_: Any) -> dict[str, Any]:
    """One row for each model and layout; short runs of this checkout and the baseline with the two smaller models."""
    names, layouts = (("0.66m", "135m"), LAYOUTS[:1]) if quick else (tuple(MODELS), LAYOUTS)
    rows, reloads = [], {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            model = str(prepare_model(config(name, 1, 1).model, 0, Path(folder) / "model"))
            reloads[name] = isolated(bare_reload, name, model, environment=engine_environment(config(name, 1, 1)))
            for engines, stage in layouts:
                found = isolated(syncs, name, model, engines, stage)
                rows.append({"model": name, "engines": engines, "zero_stage": stage, **found})
    pauses = {row["model"]: row["pause_s"] for row in rows if (row["engines"], row["zero_stage"]) == LAYOUTS[0]}
    figures = {f"pause_over_reload_{name}": pauses[name] / reloads[name]["reload_s"] for name in names}
    seconds = {row["model"]: row["seconds"] for row in rows if (row["engines"], row["zero_stage"]) == LAYOUTS[0]}
    figures |= {f"sync_s_{name}": seconds[name] for name in names}
    whole_runs: dict[str, dict[str, float]] = {}
    for name in ("0.66m", "135m") if baseline else ():
        assert baseline is not None
        whole_runs[name] = {"this_s": sync_of_a_run(name, REPOSITORY), "baseline_s": sync_of_a_run(name, baseline)}
        figures[f"sync_over_baseline_{name}"] = whole_runs[name]["this_s"] / whole_runs[name]["baseline_s"]
    return {"rows": rows, "bare_reload": reloads, "whole_runs": whole_runs, "figures": figures}


def sync_of_a_run(name: str, checkout: Path) -> float:
    """Median seconds of a sync in a short RL run, as the run itself logs them."""
    with tempfile.TemporaryDirectory() as folder:
        launch(
            "experiment=algorithms_online",
            f"model={MODELS[name]['kind']}",
            "++model.max_context_tokens=128",
            "++algorithm.group_filter=none",
            "++rollouts.group_size=4",
            "++rollouts.max_completion_tokens=8",
            "++stages.rl.steps=5",
            "++stages.rl.prompts_per_step=2",
            "++stages.rl.optimizer.warmup_steps=1",
            "++evaluation.prompts=1",
            "++evaluation.samples_per_prompt=1",
            "++evaluation.pass_at=[1]",
            "tracking=local",
            f"run_root={folder}",
            checkout=checkout,
        )
        return statistics.median(line["sync/s"] for line in step_lines(Path(folder)))


def config(name: str, engines: int, zero_stage: int) -> RunConfig:
    source = {"kind": "procedural"}
    return RunConfig.model_validate(
        {
            "experiment": "benchmark",
            "model": {**MODELS[name], "max_context_tokens": 128},
            "data": {"train": source, "evaluation": source},
            "stages": {"rl": {"kind": "rl", "steps": 1, "optimizer": {"learning_rate": 1e-6}}},
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            "rollouts": {"num_engines": engines},
            "training": {"ranks": 2, "zero_stage": zero_stage},
        }
    )


def engine_environment(chosen: RunConfig) -> dict[str, str]:
    """That of an engine of a run, as many threads that do not spin, without what the program adds for its reloads."""
    [threads] = {role.threads for role in roles(chosen) if role.name.startswith("engine")}
    threading = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GLIBC_TUNABLES": ""}
    return {**vllm_environment("cpu", chosen.rollouts.kv_cache_gib), **threading}


def syncs(name: str, model: str, engines: int, zero_stage: int) -> dict[str, float]:
    """Medians over several syncs, and the slowest pause; runs in its own process."""
    chosen = config(name, engines, zero_stage)
    with tempfile.TemporaryDirectory() as folder, Cluster(chosen, Path(folder)) as cluster:
        receivers = RayEngines(cluster, chosen, Path(model), Path(folder))
        learners = RayLearnerGroup(cluster, chosen, Path(folder))
        learners.join()
        receivers.wait_until_started()
        learners.load_model(Path(model))
        learners.connect(receivers.actors)
        probe = [list(range(20 + number, 52 + number)) for number in range(4)]
        publisher = WeightPublisher(learners, receivers, probe, chosen.attestation_limits)
        reports = [publisher.publish() for _ in range(SYNCS + 1)][1:]
        receivers.shutdown()
    return {
        "seconds": statistics.median(report.seconds for report in reports),
        "pause_s": statistics.median(report.pause_s for report in reports),
        "pause_s_max": max(report.pause_s for report in reports),
        "size_mib": reports[0].size_bytes / (1 << 20),
    }


def bare_reload(name: str, model: str) -> dict[str, float]:
    """Seconds of vLLM's layerwise reload of tensors that lie in memory; runs in its own process."""
    import safetensors.torch
    from vllm import LLM

    settings = complete_settings(model, engine_settings(config(name, 1, 1)), "ray", 0)
    for key in ("enable_log_requests", "weight_transfer_config", "worker_extension_cls"):
        del settings[key]
    llm = LLM(**settings)
    files = sorted(Path(model).glob("*.safetensors"))
    tensors = dict(itertools.chain.from_iterable(safetensors.torch.load_file(path).items() for path in files))

    def reload(worker: Any) -> float:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        network = worker.model_runner.model
        started = time.perf_counter()
        initialize_layerwise_reload(network)
        network.load_weights(tensors.items())
        finalize_layerwise_reload(network, worker.model_runner.model_config)
        return time.perf_counter() - started

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    seconds = [llm.collective_rpc(reload)[0] for _ in range(SYNCS + 1)][1:]
    return {"reload_s": statistics.median(seconds), "reload_s_max": max(seconds)}
