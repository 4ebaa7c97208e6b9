"""The records that travel between processes: NumPy and plain Python only.

A stage changes the type, never a field from `None` to a value:

    Prompt -> RenderedPrompt -> GroupTokens + TextGroup, which stay where they are, and SampleGroup -> ScoredGroup
    Prompt + worked answer = Demonstration -> TokenizedExample
    ScoredGroup, or records of a file -> PreferencePair | PreferenceGroup

Every array with one entry per token is aligned with `token_ids`: entry `t` belongs to token `t`. Tokens the policy did
not choose (the prompt, template-injected tokens) have `loss_mask[t] = False` and `rollout_logprobs[t] = 0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

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
    """Facts about a sampled completion, without its tokens and its text.

    `completion_tokens` are those the policy chose. `version_spans` cover them all. `thinks`: the completion has a
    reasoning block with something in it.
    """

    sample_id: str
    prompt_tokens: int
    completion_tokens: int
    version_spans: tuple[VersionSpan, ...]
    finish_reason: Literal["stop", "length"]
    thinks: bool = False

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def first_version(self) -> WeightVersion:
        return self.version_spans[0].version

    def tokens_before(self, version: WeightVersion) -> int:
        """How many of the first completion tokens were sampled from weights older than `version`."""
        return sum(span.end - span.start for span in self.version_spans if span.version < version)


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """The tokens of a group, sample after sample; sample n has tokens `offsets[n] <= t < offsets[n + 1]`.

    `token_ids` int32 [S] = prompt + completion exactly as the engine saw and returned them; `loss_mask` bool [S];
    `rollout_logprobs` float32 [S], nats, of the distribution really sampled from; `offsets` int64 [N + 1].
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        for number in range(len(self.offsets) - 1):
            example = self.example(number)
            logprobs = self.rollout_logprobs[self.offsets[number] : self.offsets[number + 1]]
            if logprobs.shape != example.token_ids.shape:
                raise ValueError(f"rollout_logprobs has shape {logprobs.shape}, token_ids {example.token_ids.shape}")

    def example(self, number: int) -> TokenizedExample:
        """Sample `number` as a stored completion."""
        place = slice(self.offsets[number], self.offsets[number + 1])
        return TokenizedExample(self.token_ids[place], self.loss_mask[place])


@dataclass(frozen=True, slots=True)
class TextSample:
    """A completion as rewards and people see it: decoded, with an opened `<think>`."""

    sample_id: str
    completion: str
    completion_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class TextGroup:
    """A group as rewards and people see it. `version` is the oldest that any of it was sampled from."""

    group_id: str
    prompt: Prompt
    reasoning_mode: bool
    version: WeightVersion
    samples: tuple[TextSample, ...]


class Stored(Protocol):
    """Handle of a group's tokens and text, which stay on the machine that made them until they are asked for."""

    def tokens(self) -> GroupTokens: ...

    def text(self) -> TextGroup: ...


@dataclass(frozen=True, slots=True)
class InMemory:
    """`Stored` here."""

    group_tokens: GroupTokens
    group_text: TextGroup

    def tokens(self) -> GroupTokens:
        return self.group_tokens

    def text(self) -> TextGroup:
        return self.group_text


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """The `group_size` samples of one prompt, without their tokens and text, which are where `stored` says."""

    group_id: str
    prompt: Prompt
    reasoning_mode: bool
    samples: tuple[Sample, ...]
    generate_s: float
    stored: Stored

    @property
    def first_version(self) -> WeightVersion:
        return oldest_version(self.samples)


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
class Scores:
    """One outcome for each sample of a group, in their order, and the seconds that it took."""

    outcomes: tuple[RewardOutcome, ...]
    seconds: float


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
        for number, outcome in enumerate(self.outcomes):
            if isinstance(outcome, RewardFailed):
                sample = self.group.stored.text().samples[number]
                again = f"\nSee it again: python -m rewards replay {sample.sample_id} --run {self.run_dir}"
                return (
                    f"reward {outcome.component!r} on sample {sample.sample_id}, prompt "
                    f"{self.group.prompt.prompt_id}, {outcome.attempts} attempt(s): {outcome.message}\n"
                    f"completion: {sample.completion!r}\nanswer: {self.group.prompt.answer!r}\n"
                    f"{outcome.traceback}{again if self.run_dir else ''}"
                )
        return ""


def oldest_version(samples: Sequence[Sample]) -> WeightVersion:
    """The oldest weights that any token was sampled from; 0 where all completions are empty."""
    return min((sample.first_version for sample in samples if sample.version_spans), default=0)


def _check_token_arrays(token_ids: np.ndarray, loss_mask: np.ndarray) -> None:
    if token_ids.ndim != 1 or token_ids.shape != loss_mask.shape:
        raise ValueError(
            f"token_ids {token_ids.shape} and loss_mask {loss_mask.shape} must be one-dimensional and equal"
        )
    if token_ids.size and loss_mask[0]:
        raise ValueError("loss_mask[0] must be False: the first token has no log-prob")
