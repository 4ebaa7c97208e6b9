"""Builders of records that several test files need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import settings

from rlhf.samples import (
    Prompt,
    RenderedPrompt,
    RewardOutcome,
    RewardValue,
    Sample,
    SampleGroup,
    ScoredGroup,
    VersionSpan,
)

PROMPT_TOKENS = 2

# No deadline: a machine that is busy is not a bug. The same examples every time: a failure is one for everybody.
settings.register_profile("groupwise", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("groupwise")


def sample_of(sample_id: str, completion_tokens: int, version: int) -> Sample:
    tokens = PROMPT_TOKENS + completion_tokens
    mask = np.arange(tokens) >= PROMPT_TOKENS
    return Sample(
        sample_id=sample_id,
        token_ids=np.arange(1, tokens + 1, dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        version_spans=(VersionSpan(version, 0, completion_tokens),),
        completion=f"the completion of {sample_id}",
        finish_reason="stop",
    )


def scored_of(
    outcomes: Sequence[float | RewardOutcome] = (1.0, 0.0),
    *,
    group_id: str = "g0",
    completion_tokens: Sequence[int] | None = None,
    version: int = 0,
) -> ScoredGroup:
    """A scored group; a number among `outcomes` is a reward with that value and task value."""
    lengths = completion_tokens or [3] * len(outcomes)
    samples = tuple(sample_of(f"{group_id}/{i}", n, version) for i, n in enumerate(lengths))
    prompt = Prompt(f"prompt-{group_id}", ({"role": "user", "content": "1+1=?"},), "2", "math")
    rendered = RenderedPrompt(prompt, np.arange(1, PROMPT_TOKENS + 1, dtype=np.int32), False)
    values = tuple(RewardValue(o, o, {"math": o}) if isinstance(o, int | float) else o for o in outcomes)
    return ScoredGroup(SampleGroup(group_id, rendered, samples, 0.1), values, 0.01)


@pytest.fixture(scope="session")
def make_scored() -> Callable[..., ScoredGroup]:
    return scored_of
