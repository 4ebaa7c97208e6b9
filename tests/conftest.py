"""Builders of records that several test files need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import settings

from rlhf.samples import (
    GroupTokens,
    InMemory,
    Prompt,
    RewardOutcome,
    RewardValue,
    Sample,
    SampleGroup,
    ScoredGroup,
    TextGroup,
    TextSample,
    VersionSpan,
)
from rlhf.thinking import thinks

PROMPT_TOKENS = 2

# No deadline: a machine that is busy is not a bug. The same examples every time: a failure is one for everybody.
settings.register_profile("groupwise", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("groupwise")


def text_of(
    texts: Sequence[str],
    *,
    prompt: Prompt | None = None,
    group_id: str = "g0",
    version: int = 0,
    reasoning_mode: bool = False,
    completion_tokens: int = 3,
    truncated: bool = False,
) -> TextGroup:
    """A group as rewards see it."""
    rows = tuple(TextSample(f"{group_id}/{i}", text, completion_tokens, truncated) for i, text in enumerate(texts))
    return TextGroup(group_id, prompt or prompt_of(group_id), reasoning_mode, version, rows)


def prompt_of(group_id: str) -> Prompt:
    return Prompt(f"prompt-{group_id}", ({"role": "user", "content": "1+1=?"},), "2", "math")


def tokens_of(lengths: Sequence[int]) -> GroupTokens:
    """Two prompt tokens and so many of each completion; token ids count from 1."""
    whole = [PROMPT_TOKENS + length for length in lengths]
    mask = np.concatenate([np.zeros(0, bool), *(np.arange(n) >= PROMPT_TOKENS for n in whole)])
    return GroupTokens(
        token_ids=np.concatenate([np.zeros(0, np.int32), *(np.arange(1, n + 1, dtype=np.int32) for n in whole)]),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(whole, dtype=np.int64)]),
    )


def scored_of(
    outcomes: Sequence[float | RewardOutcome] = (1.0, 0.0),
    *,
    group_id: str = "g0",
    completion_tokens: Sequence[int] | None = None,
    version: int = 0,
    spans: Sequence[tuple[VersionSpan, ...]] | None = None,
    texts: Sequence[str] | None = None,
) -> ScoredGroup:
    """A scored group; a number among `outcomes` is a reward with that value and task value."""
    lengths = completion_tokens or [3] * len(outcomes)
    versions = spans or [(VersionSpan(version, 0, length),) for length in lengths]
    shown = texts or [f"the completion of {group_id}/{i}" for i in range(len(lengths))]
    samples = tuple(
        Sample(f"{group_id}/{i}", PROMPT_TOKENS, length, versions[i], "stop", thinks(shown[i]))
        for i, length in enumerate(lengths)
    )
    stored = InMemory(tokens_of(lengths), text_of(shown, group_id=group_id, version=version))
    values = tuple(RewardValue(o, o, {"math": o}) if isinstance(o, int | float) else o for o in outcomes)
    return ScoredGroup(SampleGroup(group_id, prompt_of(group_id), False, samples, 0.1, stored), values, 0.01)


@pytest.fixture(scope="session")
def make_text() -> Callable[..., TextGroup]:
    return text_of


@pytest.fixture(scope="session")
def make_scored() -> Callable[..., ScoredGroup]:
    return scored_of
