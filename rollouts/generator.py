"""Prompt x group_size -> the samples of a group, their tokens and their text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.samples import GroupTokens, Prompt, Sample, TextGroup, TextSample, oldest_version
from rlhf.thinking import thinks
from rollouts.engine import Completion, GenerationEngine, Sampling
from rollouts.rendering import Renderer


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt to be sampled."""

    group_id: str
    prompt: Prompt
    reasoning_mode: bool
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Generated:
    """A sampled group: what is known of its samples, their tokens and their text, and the seconds that it took."""

    samples: tuple[Sample, ...]
    tokens: GroupTokens
    text: TextGroup
    seconds: float


@dataclass(frozen=True, slots=True)
class Facts:
    """The part of a sampled group that the driver sees."""

    samples: tuple[Sample, ...]
    seconds: float


class Generator:
    """Renders a prompt, samples its completions and keeps the tokens exactly as the engine returned them."""

    def __init__(self, engine: GenerationEngine, renderer: Renderer) -> None:
        self._engine = engine
        self._renderer = renderer

    async def generate(self, request: GroupRequest) -> Generated:
        """Raises DataError when the prompt leaves no room in the context."""
        started = time.monotonic()
        rendered = self._renderer.prompt(request.prompt, request.reasoning_mode)
        stop = self._renderer.stop_token_ids
        completions = await self._engine.generate(request.group_id, rendered.token_ids, request.sampling, stop)
        seconds = time.monotonic() - started
        texts = [self._renderer.completion_text(one.token_ids, rendered.reasoning_mode) for one in completions]
        samples = tuple(
            Sample(
                sample_id=f"{request.group_id}/{number}",
                prompt_tokens=len(rendered.token_ids),
                completion_tokens=len(completion.token_ids),
                version_spans=completion.version_spans,
                finish_reason=completion.finish_reason,
                thinks=thinks(text),
            )
            for number, (completion, text) in enumerate(zip(completions, texts, strict=True))
        )
        return Generated(
            samples, group_tokens(rendered.token_ids, completions), _text(request, samples, texts), seconds
        )


def group_tokens(prompt: np.ndarray, completions: Sequence[Completion]) -> GroupTokens:
    """The completions of one prompt, with the prompt before each."""
    lengths = [len(prompt) + len(one.token_ids) for one in completions]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    unsampled = np.zeros(len(prompt), np.float32)
    return GroupTokens(
        token_ids=np.concatenate([part for one in completions for part in (prompt, one.token_ids)]),
        loss_mask=np.concatenate([np.arange(length) >= len(prompt) for length in lengths]),
        rollout_logprobs=np.concatenate([part for one in completions for part in (unsampled, one.logprobs)]),
        offsets=offsets,
    )


def _text(request: GroupRequest, samples: Sequence[Sample], texts: Sequence[str]) -> TextGroup:
    rows = tuple(
        TextSample(sample.sample_id, text, sample.completion_tokens, sample.truncated)
        for sample, text in zip(samples, texts, strict=True)
    )
    return TextGroup(request.group_id, request.prompt, request.reasoning_mode, oldest_version(samples), rows)
