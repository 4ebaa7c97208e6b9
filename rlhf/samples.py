"""The records that travel between processes: NumPy and plain Python only.

A stage changes the type, never a field from `None` to a value:

    Prompt -> RenderedPrompt -> SampleGroup -> ScoredGroup
    Prompt + worked answer = Demonstration -> TokenizedExample
    ScoredGroup, or records of a file -> PreferencePair | PreferenceGroup

Every array with one entry per token is aligned with `token_ids`: entry `t` belongs to token `t`. Tokens the policy did
not choose (the prompt, template-injected tokens) have `loss_mask[t] = False` and `rollout_logprobs[t] = 0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

WeightVersion = int
"""Counts committed weight syncs: 0 is what the learner held when the first sync was made."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem: what the policy is asked and how an answer to it is judged.

    `prompt_id` is stable across runs. `messages` are chat messages (`{"role", "content"}`) that end with a user turn.
    `reward` names the registered reward that verifies the answer. `metadata` is passed to that reward unchanged.
    """

    prompt_id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    reward: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The messages for people: `role: content`, one a line."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with a worked answer: `reasoning` is the thinking (may be empty), `content` what the user sees."""

    prompt: Prompt
    reasoning: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """A demonstration as tokens. `token_ids` int32 [T], `loss_mask` bool [T] (True on completion tokens)."""

    token_ids: np.ndarray
    loss_mask: np.ndarray

    def __post_init__(self) -> None:
        _check_token_arrays(self.token_ids, self.loss_mask)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, the first preferred; both hold the prompt's tokens."""

    pair_id: str
    chosen: TokenizedExample
    rejected: TokenizedExample

    @property
    def completions(self) -> tuple[TokenizedExample, TokenizedExample]:
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """Completions of one prompt, each with a reward; all hold the prompt's tokens."""

    group_id: str
    completions: tuple[TokenizedExample, ...]
    rewards: tuple[float, ...]


PreferenceUnit = PreferencePair | PreferenceGroup
"""What is dealt, shuffled and trained as one; its `completions` become rows in their order."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt after the chat template, int32 [T_prompt]; in `reasoning_mode` the template opened `<think>`."""

    prompt: Prompt
    token_ids: np.ndarray
    reasoning_mode: bool


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Completion tokens `start <= t < end` (0 = first completion token) were sampled from `version`."""

    version: WeightVersion
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion.

    `token_ids` int32 [T] = prompt + completion exactly as the engine saw and returned them; `loss_mask` bool [T];
    `rollout_logprobs` float32 [T], nats, of the distribution really sampled from. `version_spans` cover all completion
    tokens. `completion` is the decoded text including an opened `<think>`, for rewards and for people.
    """

    sample_id: str
    token_ids: np.ndarray
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    version_spans: tuple[VersionSpan, ...]
    completion: str
    finish_reason: Literal["stop", "length"]

    def __post_init__(self) -> None:
        _check_token_arrays(self.token_ids, self.loss_mask)
        if self.rollout_logprobs.shape != self.token_ids.shape:
            raise ValueError(
                f"rollout_logprobs has shape {self.rollout_logprobs.shape}, token_ids {self.token_ids.shape}"
            )

    @property
    def completion_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def first_version(self) -> WeightVersion:
        return self.version_spans[0].version


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """The `group_size` samples of one prompt."""

    group_id: str
    rendered: RenderedPrompt
    samples: tuple[Sample, ...]
    generate_s: float

    @property
    def prompt(self) -> Prompt:
        return self.rendered.prompt

    @property
    def first_version(self) -> WeightVersion:
        return min(sample.first_version for sample in self.samples)


@dataclass(frozen=True, slots=True)
class RewardValue:
    """A sample's reward: `value` trains (weighted sum of parts), `task` is the unshaped correctness metric.

    `parts` has the unweighted value of each component, `reason` a short note for the sample table.
    """

    value: float
    task: float
    parts: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Abstained:
    """The reward does not apply to this sample: it is masked from the baseline and the loss, and counted."""

    component: str
    reason: str


@dataclass(frozen=True, slots=True)
class RewardFailed:
    """The reward could not be computed after `attempts` tries. Never a zero: masked, counted, charged to the budget.

    `kind` is raised, invalid, transient, timeout, crash or memory. It was called with `params`, and with all samples of
    the group where `whole_group`.
    """

    component: str
    message: str
    traceback: str
    attempts: int
    kind: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    whole_group: bool = False


RewardOutcome = RewardValue | Abstained | RewardFailed


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with one outcome for each sample, in the same order.

    `run_dir` is where its failed rewards were written down, if they were.
    """

    group: SampleGroup
    outcomes: tuple[RewardOutcome, ...]
    score_s: float
    run_dir: str = ""

    def __post_init__(self) -> None:
        if len(self.outcomes) != len(self.group.samples):
            raise ValueError(f"{len(self.outcomes)} outcomes for {len(self.group.samples)} samples")

    @property
    def valued(self) -> tuple[tuple[Sample, RewardValue], ...]:
        """The samples that have a reward, with it."""
        pairs = zip(self.group.samples, self.outcomes, strict=True)
        return tuple((sample, outcome) for sample, outcome in pairs if isinstance(outcome, RewardValue))

    @property
    def failed(self) -> tuple[tuple[Sample, RewardFailed], ...]:
        """The samples whose reward failed, with how."""
        pairs = zip(self.group.samples, self.outcomes, strict=True)
        return tuple((sample, outcome) for sample, outcome in pairs if isinstance(outcome, RewardFailed))

    @property
    def failure_report(self) -> str:
        """The group's first failed reward: the very sample, the author's traceback and the command that makes it again.

        Empty where none failed.
        """
        for sample, failure in self.failed:
            again = f"\nSee it again: python -m rewards replay {sample.sample_id} --run {self.run_dir}"
            return (
                f"reward {failure.component!r} on sample {sample.sample_id}, prompt {self.group.prompt.prompt_id}, "
                f"{failure.attempts} attempt(s): {failure.message}\ncompletion: {sample.completion!r}\n"
                f"answer: {self.group.prompt.answer!r}\n{failure.traceback}{again if self.run_dir else ''}"
            )
        return ""


def _check_token_arrays(token_ids: np.ndarray, loss_mask: np.ndarray) -> None:
    if token_ids.ndim != 1 or token_ids.shape != loss_mask.shape:
        raise ValueError(
            f"token_ids {token_ids.shape} and loss_mask {loss_mask.shape} must be one-dimensional and equal"
        )
    if token_ids.size and loss_mask[0]:
        raise ValueError("loss_mask[0] must be False: the first token has no log-prob")
