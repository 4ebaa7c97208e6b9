"""What a run will do, before anything is started: processes, cores and GPUs, batch arithmetic."""

from __future__ import annotations

from rlhf.cluster import bundles, roles
from rlhf.config import RewardComponent, RlStage, RunConfig, SftStage
from rlhf.training.batching import micro_batch_count

Section = tuple[str, list[tuple[str, object]]]


def plan(config: RunConfig) -> list[Section]:
    """Sections of (key, value) rows for the console."""
    return [
        ("run", [("experiment", config.experiment), ("seed", config.seed), ("model", _model(config))]),
        ("processes", _processes(config)),
        *((f"stage {name}", _stage(config, stage)) for name, stage in config.stages.items()),
        ("weight sync", [("transport", config.transport), ("max staleness", config.rollouts.max_staleness)]),
        ("rewards", [(name, _component(c)) for name, c in config.rewards.components.items()]),
        ("evaluation", [("held-out prompts", config.evaluation.prompts), ("samples", _samples(config))]),
    ]


def _model(config: RunConfig) -> str:
    name = getattr(config.model, "path", config.model.kind)
    return f"{name}, {config.model.dtype}, context {config.model.max_context_tokens} tokens"


def _samples(config: RunConfig) -> str:
    return f"1 greedy + {config.evaluation.samples_per_prompt} sampled a prompt"


def _component(component: RewardComponent) -> str:
    return f"weight {component.weight:g}, {component.applies}, deadline {component.deadline_s:g} s"


def _processes(config: RunConfig) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for kind, what in (("learner", "DeepSpeed ZeRO-{z}"), ("engine", "vLLM"), ("reward", "graders")):
        found = [role for role in roles(config) if role.name.startswith(kind)]
        share = f"{found[0].cpus:g} CPU" + (f", {found[0].gpus:g} GPU" if found[0].gpus else "")
        rows.append((kind, f"{len(found)} x {what.format(z=config.training.zero_stage)}, {share} each"))
    wanted = bundles(config)
    total = {key: sum(bundle.get(key, 0.0) for bundle in wanted) for key in ("CPU", "GPU")}
    rows.append(("reserved", ", ".join(f"{value:g} {key}" for key, value in total.items() if value)))
    rows.append(("device", f"{config.cluster.device}, {config.cluster.placement}"))
    return rows


def _stage(config: RunConfig, stage: SftStage | RlStage) -> list[tuple[str, object]]:
    ranks, size = config.training.ranks, config.training.micro_batch_size
    if isinstance(stage, SftStage):
        rows, what = stage.batch_size, f"{stage.batch_size} demonstrations"
    else:
        group, updates = config.rollouts.group_size, stage.updates_per_step
        rows = stage.prompts_per_step * group // updates
        what = f"{stage.prompts_per_step} prompts x {group} samples = {stage.prompts_per_step * group} rows"
        what += f", {updates} optimiser step(s)"
    count = micro_batch_count(rows, ranks, size)
    arithmetic = f"{rows} rows = {ranks} ranks x {count} micro-batches x up to {size}"
    optimizer = stage.optimizer
    rate = f"{optimizer.learning_rate:g}, {optimizer.warmup_steps} warm-up, {optimizer.schedule}"
    algorithm = "sft" if isinstance(stage, SftStage) else config.algorithm.name
    return [
        ("algorithm", algorithm),
        ("steps", stage.steps),
        ("a step", what),
        ("an update", arithmetic),
        ("learning rate", rate),
    ]
