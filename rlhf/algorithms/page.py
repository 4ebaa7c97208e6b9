"""The documentation of all algorithms as one Markdown page, made from the registered classes.

    python -m rlhf.algorithms [NAME ...]     print it, or the sections of some algorithms
    python -m rlhf.algorithms --write        write docs/algorithms.md

What a class knows (fields, bounds, defaults, what it refuses) is read off the class; only what it cannot know is text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.algorithms import registry
from rlhf.algorithms.base import Algorithm, Data, Needs
from rlhf.algorithms.correction import Correction, CorrectionPart
from rlhf.algorithms.kl import Estimator, Kl, Placement
from rlhf.algorithms.offline import OfflineAlgorithm
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.errors import ConfigError, did_you_mean
from rlhf.schema import Schema

FILE = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"

FAMILIES: tuple[tuple[type[Algorithm], str], ...] = (
    (Algorithm, "Fields of all algorithms"),
    (OnlineAlgorithm, "Fields of all online algorithms"),
    (OfflineAlgorithm, "Fields of all offline algorithms"),
)
"""Classes whose fields are documented once, and the heading under which."""

TRAINS_ON: Mapping[Data, str] = {
    "demonstrations": "demonstrations: stages of kind `sft`",
    "rollouts": "fresh rollouts: stages of kind `rl`",
    "pairs": "stored pairs of a chosen and a rejected completion: stages of kind `preference`",
    "groups": "stored groups of completions with rewards: stages of kind `preference`",
}

ESTIMATORS: Mapping[Estimator, str] = {
    "k1": "`u`",
    "k2": "`u^2 / 2`",
    "k3": "`exp(-u) - 1 + u`",
    "k3_weighted": "`(pi_theta / pi_prox) (exp(-u) - 1 + u)`",
}

GRADIENTS: Mapping[tuple[Estimator, Placement], str] = {
    ("k1", "reward"): "of the reverse KL of whole sequences; the baseline and any division by a deviation apply to it",
    ("k1", "reward_to_go"): "of the reverse KL of whole sequences with reduction `sequence_sum`: "
    "`sum_t (sum_{s >= t} u_s) grad lp_t`. It enters after normalisation, so no deviation rescales the coefficient",
    ("k2", "loss"): "of the reverse KL of each token given those before it, on-policy: `u grad lp`",
    ("k3", "loss"): "of the *forward* KL(reference || policy) of each token, on-policy: `(1 - exp(-u)) grad lp`",
    ("k3_weighted", "loss"): "of the reverse KL of each token, also off-policy: `(pi_theta / pi_prox) u grad lp`",
}
"""Every combination that `Kl` accepts -> the gradient it has."""

REDUCTIONS: Mapping[str, tuple[str, str]] = {
    "sequence_sum": ("(1/N) sum_i sum_t l", "every token counts the same, long sequences more"),
    "sequence_mean": ("(1/N) sum_i (1/T_i) sum_t l", "every sequence counts the same, tokens of long ones less"),
    "token_mean": ("(1/L) sum_i sum_t l", "every token of the batch counts the same"),
    "fixed_length": ("(1/(N C)) sum_i sum_t l", "as `sequence_sum`, scaled by the constant `fixed_length` = C"),
}

FILTERS: Mapping[str, str] = {
    "none": "nothing",
    "zero_variance": "groups whose rewards are all equal",
    "all_correct": "groups whose samples are all correct; those with none correct stay",
    "not_mixed": "groups whose samples are all correct, or all incorrect",
}

METRICS: Mapping[str, Mapping[str, str]] = {
    "Every stage that trains": {
        "policy/loss": "what the optimiser step minimised, over the global batch",
        "policy/entropy_nats": "entropy of the policy at the trained tokens",
        "policy/nll_nats": "minus the log-prob of the trained tokens",
        "optim/grad_norm": "before clipping",
        "optim/learning_rate": "of the last optimiser step",
        "time/<phase>_s": "seconds of each phase; `time/step_s` their sum",
        "perf/trained_tokens": "tokens on the loss mask; `perf/trained_tokens_per_s` per second of the step",
    },
    "Every `rl` stage": {
        "rollout/groups": "groups that came back since the last step, trained or not; `rollout/samples` their samples",
        "rollout/zero_variance_fraction": "share of those groups with equal rewards",
        "rollout/completion_tokens": "mean length; `rollout/completion_tokens_max` the longest",
        "rollout/truncated_fraction": "share of samples that reached the length limit",
        "rollout/thinks_fraction": "share of samples with something in their reasoning block",
        "rollout/generate_s": "mean seconds to sample a group; `rollout/score_s` to score one",
        "reward/mean": "over all samples that came back; `reward/std` their deviation",
        "reward/task": "mean of the unshaped task metric",
        "reward/part/<name>": "mean of each reward component",
        "reward/weight/<name>": "what a component with a `weight_schedule` weighs in the newest samples",
        "reward/abstained": "samples without a reward because none applies; `reward/failed` because of an error",
        "trained/groups": "groups that trained in this step",
        "trained/reward_mean": "their mean reward; `trained/completion_tokens` their mean length",
        "advantage/abs_mean": "mean absolute advantage",
        "staleness/mean_steps": "learner version less the sample's; `staleness/max_steps` the largest",
        "mismatch/kl_nats": "KL(rollout || proximal), k1, over all trained tokens",
        "mismatch/abs_gap_nats": "mean absolute log-prob gap; `mismatch/abs_gap_nats_max` the largest",
        "mismatch/fresh/<name>": "the same over samples of the newest weights alone, where some are older",
        "mismatch/ratio": "proximal over rollout before any truncation; also `mismatch/ratio_min` and "
        "`mismatch/ratio_max`",
        "mismatch/masked_fraction": "share of tokens that the correction silenced",
        "policy/ratio": "`pi_theta / pi_prox`, where the loss has that ratio",
        "policy/kl_nats": "k1 to the reference; only with `kl.coefficient` > 0",
        "sync/s": "seconds to publish new weights, of which `sync/pause_s` without generation; `sync/bytes` their size",
        "sync/probe_max_gap_nats": "largest log-prob gap of learner and engines on the probe",
        "dispatch/in_flight": "groups being sampled or scored when the step was taken; `dispatch/ready` those that "
        "wait for a step, `dispatch/waiting` those that wait for an engine",
        "dispatch/dispatched": "groups dispatched since the step before",
        "dispatch/acceptance": "share of the latest groups that can train",
        "dispatch/aborted": "groups aborted since the step before, `dispatch/aborted/<reason>` by reason; "
        "`dispatch/aborted_tokens_mean` their completion tokens up to then",
        "engine/running": "requests that run on all engines; `engine/waiting` those that wait",
        "engine/cache_usage_max": "share in use of the fullest key-value cache; `engine/preemptions` requests that "
        "had to give theirs up",
        "engine/prefix_hit_rate": "share of prompt tokens found in the prefix cache",
        "engine/kept_syncs": "syncs since the key-value cache was last recomputed",
        "ledger/<state>": "groups in each state since the start of the stage",
    },
    "Every `collect` and `filter` stage, once": {
        "collect/picked": "pairs or groups; also the `rollout/` and `reward/` metrics of all samples",
        "collect/without/<reason>": "prompts that gave none",
        "filter/<verdict>": "prompts that were kept or dropped",
    },
    "Every evaluation": {
        "evaluation/<figure>": "of held-out prompts: `greedy`, `pass@1` and the rest of `summary.json`"
    },
}
"""Who logs it -> metric -> meaning. What an algorithm adds to these is in its `about.metrics`."""


# --- the page ---------------------------------------------------------------------------------------------------------


def page() -> str:
    """The whole document. Equal registered classes give equal text."""
    names = registry.names()
    parts = [_introduction(names), *(section(name) for name in names), *(_family(*entry) for entry in FAMILIES)]
    parts += [_kl(), _corrections(), _reductions(), _filters(), _metrics()]
    return "\n\n".join(parts) + "\n"


def section(name: str) -> str:
    """The part of the page on one algorithm. ConfigError, with the nearest name, when none is called so."""
    if name not in registry.names():
        fix = did_you_mean(name, registry.names())
        raise ConfigError([f"algorithm = {name}: must be a registered algorithm. None has this name. {fix}"])
    kind = registry.algorithm(name)
    about = kind.about
    parts = [
        f"## {name}",
        f"**{about.title}.** Source: {about.source}.",
        f"```text\n{about.formula}\n```",
        _listed("Differs from the source, or decides what it leaves open:", about.deviations),
        _listed("Needs:", needs_in_words(kind)),
        _field_table(kind, own_fields(kind), name),
        _shared_fields(kind),
        _listed("Refuses, besides what the parts refuse:", refusals(kind)),
        _listed("Logs, besides the [metrics](#metrics) of its kind of stage:", map(_metric, about.metrics.items())),
    ]
    return "\n\n".join(filter(None, parts))


def help_for(arguments: Sequence[str]) -> str | None:
    """The section that `--help` (or `-h`) among command-line `arguments` asks for by `algorithm=NAME`, else None."""
    if not {"--help", "-h"} & set(arguments):
        return None
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    name = given.get("algorithm.name") or given.get("++algorithm.name") or given.get("algorithm")
    return section(name) if name in registry.names() else None


def _introduction(names: Sequence[str]) -> str:
    rows = []
    for name in names:
        kind = registry.algorithm(name)
        rows.append((f"[`{name}`](#{name})", kind.about.title, default_needs(kind).data, kind.about.source))
    return f"""\
# Algorithms

`algorithm=NAME` chooses one for the run, `stages.STAGE.algorithm.name=NAME` for a stage; `algorithm.FIELD=VALUE` sets a
hyper-parameter. `python -m rlhf.algorithms NAME` prints one section of this page. The page is made from the code by
`make docs`.

{_table(("name", "title", "trains on", "source"), rows)}

Notation: `o_i` is completion i of N with `T_i` tokens and reward `r_i`, `L = sum_i T_i`, `lp_t` the log-prob of token t
under the policy `pi_theta` that is trained. `pi_rollout` is the engine that sampled, `pi_prox` the learner with the
weights at the start of the update, `pi_ref` with those at the start of the stage; `u_t = log pi_theta - log pi_ref`. A
formula named J is maximised, one named L minimised."""


def default_needs(kind: type[Algorithm]) -> Needs:
    """What an algorithm needs at its defaults, also where a field has none and it cannot be built."""
    no_values: dict[str, Any] = {}
    return kind.model_construct(**no_values).needs


# --- one algorithm ----------------------------------------------------------------------------------------------------


def own_fields(kind: type[Algorithm]) -> list[str]:
    """Fields that no shared section has, or that are different there."""
    shared = [base.model_fields for base, _ in FAMILIES if issubclass(kind, base) and kind is not base]
    return [name for name, field in kind.model_fields.items() if not any(_same(field, s.get(name)) for s in shared)]


def needs_in_words(kind: type[Algorithm]) -> Iterator[str]:
    """What a run must provide, at the defaults and, where that changes it, with the parts switched on."""
    needs = default_needs(kind)
    yield f"{TRAINS_ON[needs.data]}."
    if needs.group_baseline:
        yield "at least 2 samples a prompt (`rollouts.group_size`): the group is the baseline."
    if needs.reference_logprobs:
        yield "log-probs of the reference, the policy at the start of the stage."
    elif issubclass(kind, OnlineAlgorithm):
        yield "a reference (the policy at the start of the stage) only with `kl.coefficient` > 0."
    else:
        yield "no reference."
    if not needs.rollouts:
        return
    whole = "the engine's probabilities over the whole vocabulary (`rollouts.top_p` 1, `rollouts.top_k` 0)"
    yield f"{whole}." if needs.importance_ratio else f"{whole} only with a `correction`."
    if needs.on_policy:
        rule = "`updates_per_step` 1, and `rollouts.max_staleness` 0 unless a `correction` weighs by the ratio"
        yield f"on-policy samples, as its loss has no ratio to the policy that sampled: {rule}."


def refusals(kind: type[Algorithm]) -> list[str]:
    """Settings of the shared parts that this algorithm does not take, found by trying each."""
    if not issubclass(kind, OnlineAlgorithm):
        return []
    tried: dict[str, dict[str, Any]] = {f"correction.kind = {k}": {"correction": {"kind": k}} for k in corrections()}
    tried |= {
        f"kl.placement = {placement}": {"kl": {"coefficient": 0.1, "estimator": estimator, "placement": placement}}
        for estimator, placement in GRADIENTS
    }
    usual = _problems(kind, {})
    refused = {setting: _problems(kind, given) - usual for setting, given in tried.items()}
    reasons: dict[str, list[str]] = {}
    for setting, problems in refused.items():
        if problems:
            reasons.setdefault(_reason(problems), []).append(f"`{setting}`")
    return [f"{', '.join(settings)}. {reason}" for reason, settings in reasons.items()]


def _problems(kind: type[BaseModel], given: Mapping[str, Any]) -> set[str]:
    try:
        kind.model_validate(given)
    except ValidationError as error:
        return {item["msg"].removeprefix("Value error, ") for item in error.errors(include_url=False)}
    return set()


def _reason(problems: Iterable[str]) -> str:
    """Messages read `setting must not be so. Reason. Fix`: what follows the rule."""
    return " ".join(message.partition(". ")[2] or message for message in sorted(problems)).rstrip(".") + "."


def _shared_fields(kind: type[Algorithm]) -> str:
    titles = [title.lower() for base, title in FAMILIES if issubclass(kind, base)]
    return "Also has the " + " and the ".join(f"[{t}](#{t.replace(' ', '-')})" for t in titles) + "."


def _same(field: FieldInfo, other: FieldInfo | None) -> bool:
    return other is not None and (field.annotation, field.metadata, field.default) == (
        other.annotation,
        other.metadata,
        other.default,
    )


# --- fields -----------------------------------------------------------------------------------------------------------


def _family(kind: type[Algorithm], title: str) -> str:
    names = own_fields(kind)
    table = _field_table(kind, names, "NAME")
    return f"## {title}\n\n{table or 'None beyond the others.'}"


def _field_table(kind: type[BaseModel], names: Sequence[str], label: str) -> str:
    if not names:
        return f"`{label}` has no hyper-parameters of its own."
    schema = Schema.of(kind)
    rows = [
        (f"`{name}`", _allowed(name, schema.child(name)), _default(kind.model_fields[name]), _description(kind, name))
        for name in names
    ]
    columns = 4 if any(meaning for *_, meaning in rows) else 3
    return _table(("field", "allowed", "default", "meaning")[:columns], [row[:columns] for row in rows])


def _allowed(name: str, place: Schema) -> str:
    if place.tags or place.properties:
        return f"see [{name}](#{name})"
    return f"always {place.node['const']}" if "const" in place.node else place.description


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    return "(must be given)" if value is PydanticUndefined else f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    """As it is written on the command line."""
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _description(kind: type[BaseModel], name: str) -> str:
    """Of the field, or of the nearest base class that says something: a new default does not need the text again."""
    found = (base.model_fields.get(name) for base in kind.__mro__ if issubclass(base, BaseModel))
    return next((field.description for field in found if field is not None and field.description), "")


# --- the parts --------------------------------------------------------------------------------------------------------


def _kl() -> str:
    rows = [[f"`{name}`", formula, *_placements(name)] for name, formula in ESTIMATORS.items()]
    header = ("estimator", "value", *(f"placement `{placement}`" for placement in get_args(Placement)))
    return "\n\n".join(
        [
            f"## kl\n\n{_paragraphs(Kl)}",
            _field_table(Kl, list(Kl.model_fields), "kl"),
            "The gradient of each estimator in each placement, or why it is refused:",
            _table(header, rows),
        ]
    )


def _placements(estimator: Estimator) -> Iterator[str]:
    for placement in get_args(Placement):
        problems = _problems(Kl, {"coefficient": 0.1, "estimator": estimator, "placement": placement})
        yield f"refused: {_reason(problems)}" if problems else GRADIENTS[estimator, placement]


def corrections() -> dict[str, type[CorrectionPart]]:
    """`kind` -> class of every correction."""
    union, _ = get_args(Correction)
    return {get_args(part.model_fields["kind"].annotation)[0]: part for part in get_args(union)}


def _corrections() -> str:
    parts = [
        f"## correction\n\n{_paragraphs(CorrectionPart)} `k = pi_prox / pi_rollout` of a token: the same weights, "
        "learner over engine. The KL is never multiplied. `algorithm.correction.kind=...` chooses one.",
    ]
    for kind, part in corrections().items():
        fields = [name for name in part.model_fields if name != "kind"]
        table = f"\n\n{_field_table(part, fields, kind)}" if fields else ""
        parts.append(f"### correction: {kind}\n\n{_paragraphs(part)}{table}")
    return "\n\n".join(parts)


def _reductions() -> str:
    rows = [(f"`{name}`", f"`{formula}`", meaning) for name, (formula, meaning) in REDUCTIONS.items()]
    text = (
        "How the losses `l` of tokens become the number that is minimised. N, `T_i` and L are those of the global "
        "batch of one optimiser step, so the gradient does not depend on micro-batches, ranks or padding."
    )
    return f"## reduction\n\n{text}\n\n{_table(('name', 'formula', 'weight'), rows)}"


def _filters() -> str:
    rows = [(f"`{name}`", meaning) for name, meaning in FILTERS.items()]
    text = (
        "Which groups do not train. New ones are sampled in their place, up to `rollouts.max_dispatch_factor`. A "
        "sample is correct when its task metric reaches `rewards.correct_at`."
    )
    return f"## group_filter\n\n{text}\n\n{_table(('name', 'drops'), rows)}"


def _metrics() -> str:
    parts = [_listed(f"{who}:", map(_metric, metrics.items())) for who, metrics in METRICS.items()]
    rule = "Averages are over trained tokens, of `policy/ratio` also the raw minimum and maximum (`_min`, `_max`)."
    return "\n\n".join(["## metrics", "In `metrics.jsonl` and W&B. " + rule, *parts])


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _listed(heading: str, items: Iterable[str]) -> str:
    lines = [f"* {item}" for item in items]
    return "\n".join([heading, "", *lines]) if lines else ""


def _metric(entry: tuple[str, str]) -> str:
    return f"`{entry[0]}`: {entry[1]}"


def _paragraphs(kind: type) -> str:
    """The docstring, each paragraph on one line."""
    text = inspect.getdoc(kind) or ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
