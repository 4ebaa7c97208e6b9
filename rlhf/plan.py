"""What a run will do, before anything is started: processes, cores and GPUs, batch arithmetic."""

from __future__ import annotations

from rlhf.algorithms import build
from rlhf.checkpoints.journal import TOKEN_BYTES
from rlhf.cluster import Role, bundles, roles
from rlhf.config import (
    CollectStage,
    FilterStage,
    PreferenceFile,
    PreferenceStage,
    RewardComponent,
    RlStage,
    RunConfig,
    SftStage,
    StageConfig,
    TrainingStage,
)
from rlhf.training.zero_settings import optimizer_name

Section = tuple[str, list[tuple[str, object]]]


def plan(config: RunConfig) -> list[Section]:
    """Sections of (key, value) rows for the console."""
    return [
        ("run", [("experiment", config.experiment), ("seed", config.seed), ("model", _model(config))]),
        ("processes", _processes(config)),
        *((f"stage {name}", _stage(config, stage)) for name, stage in config.stages.items()),
        ("weight sync", [("transport", config.transport), ("max staleness", config.rollouts.max_staleness)]),
        ("checkpoints", _checkpoints(config)),
        ("rewards", [(name, _component(c)) for name, c in config.rewards.components.items()]),
        ("evaluation", [("held-out prompts", config.evaluation.prompts), ("samples", _samples(config))]),
    ]


def _checkpoints(config: RunConfig) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("every", _cadence(config)), ("kept", f"the newest {config.checkpoints.keep}")]
    stages = [stage for stage in config.stages.values() if isinstance(stage, RlStage)]
    if stages:
        samples = max(stage.prompts_per_step for stage in stages) * config.rollouts.group_size
        most = samples * config.model.max_context_tokens * TOKEN_BYTES / (1 << 20)
        rows.append(("journal", f"{most:,.1f} MiB a step at most, back to the oldest checkpoint"))
    return rows


def _cadence(config: RunConfig) -> str:
    every = config.checkpoints
    steps = f" or {every.every_steps} steps" if every.every_steps else ""
    return f"{every.every_s:g} s{steps}, and at the end of each stage"


def _model(config: RunConfig) -> str:
    name = getattr(config.model, "path", config.model.kind)
    return f"{name}, {config.model.dtype}, context {config.model.max_context_tokens} tokens"


def _samples(config: RunConfig) -> str:
    return f"1 greedy + {config.evaluation.samples_per_prompt} sampled a prompt"


def _component(component: RewardComponent) -> str:
    return f"weight {component.weight:g}, {component.applies}, deadline {component.deadline_s:g} s"


def _processes(config: RunConfig) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    training = config.training
    adam = optimizer_name(training, config.cluster.device)
    learner = f"DeepSpeed ZeRO-{training.zero_stage}, {adam}"
    for kind, what in (("learner", learner), ("engine", "vLLM"), ("reward", "graders")):
        found = [role for role in roles(config) if role.name.startswith(kind)]
        rows.append((kind, f"{len(found)} x {what}, {_share(found[0])} each"))
    for role in roles(config):
        if role.name.startswith("server-"):
            server = config.servers[role.name.removeprefix("server-")]
            rows.append((role.name.replace("-", " ", 1), f"vLLM {server.kind}, {server.model}, {_share(role)}"))
    wanted = bundles(config)
    total = {key: sum(bundle.get(key, 0.0) for bundle in wanted) for key in ("CPU", "GPU")}
    rows.append(("reserved", ", ".join(f"{value:g} {key}" for key, value in total.items() if value)))
    rows.append(("device", f"{config.cluster.device}, {config.cluster.placement}"))
    return rows


def _share(role: Role) -> str:
    threads = f", {role.threads} threads" if role.threads > 1 else ""
    return f"{role.cpus:g} CPU" + (f", {role.gpus:g} GPU" if role.gpus else "") + threads


def _stage(config: RunConfig, stage: StageConfig) -> list[tuple[str, object]]:
    match stage:
        case SftStage():
            what = f"{stage.batch_size} demonstrations"
            return _training(config, stage, what, stage.batch_size, stage.steps)
        case RlStage():
            group, updates = config.rollouts.group_size, stage.updates_per_step
            what = f"{stage.prompts_per_step} prompts x {group} samples = {stage.prompts_per_step * group} rows"
            what += f", {updates} optimiser step(s)"
            return _training(config, stage, what, stage.prompts_per_step * group // updates, stage.steps)
        case PreferenceStage():
            return _preference(config, stage)
        case FilterStage():
            dropped = f"{stage.drop_at_least or stage.samples_per_prompt} or more"
            dropped += "" if stage.drop_at_most is None else f", or {stage.drop_at_most} or fewer"
            return [
                ("prompts", f"up to {stage.prompts} x {stage.samples_per_prompt}"),
                ("dropped", f"{dropped} correct"),
            ]
        case CollectStage():
            rule = f"{stage.chosen} over {stage.rejected}" if stage.produce == "pairs" else f"of {stage.group_size}"
            reused = [("reused", f"{stage.reuse_fraction:.0%} from {stage.reuse}")] if stage.reuse else []
            prompts = f"up to {stage.prompts} x {stage.samples_per_prompt}"
            return [("prompts", prompts), (stage.produce, rule), *reused]


def _named(data: str | PreferenceFile) -> str:
    return data if isinstance(data, str) else data.path


def _preference(config: RunConfig, stage: PreferenceStage) -> list[tuple[str, object]]:
    chosen, collect = config.algorithm_of(stage), None
    data = build(chosen.name, chosen.hyperparameters, chosen.modules).needs.data
    if isinstance(stage.data, str):
        collect = config.stages.get(stage.data)
    what, epochs = f"{stage.batch_size} {data} of {_named(stage.data)}", f"{stage.epochs:g} epoch(s)"
    if data == "pairs":
        return _training(config, stage, what, 2 * stage.batch_size, epochs)
    if isinstance(collect, CollectStage):
        return _training(config, stage, what, stage.batch_size * collect.group_size, epochs)
    # Only the file knows how many completions its groups have.
    return [row for row in _training(config, stage, what, stage.batch_size, epochs) if row[0] != "an update"]


def _training(
    config: RunConfig, stage: TrainingStage, what: str, sequences: int, steps: object
) -> list[tuple[str, object]]:
    """The rows of a stage that trains `sequences` an update."""
    ranks, budget = config.training.ranks, config.token_budget
    optimizer = stage.optimizer
    return [
        ("algorithm", config.algorithm_of(stage).name),
        ("steps", steps),
        ("a step", what),
        ("an update", f"{sequences} sequences over {ranks} ranks, packed into micro-batches of {budget} tokens"),
        ("learning rate", f"{optimizer.learning_rate:g}, {optimizer.warmup_steps} warm-up, {optimizer.schedule}"),
    ]
