"""Prompt x group_size -> SampleGroup."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from rlhf.samples import Prompt, RenderedPrompt, Sample, SampleGroup
from rollouts.engine import Completion, GenerationEngine, SamplingRequest
from rollouts.rendering import Renderer


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt to be sampled. `temperature` 0 is greedy."""

    group_id: str
    prompt: Prompt
    reasoning_mode: bool
    samples: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0


class Generator:
    """Renders a prompt, samples its completions and keeps the tokens exactly as the engine returned them."""

    def __init__(self, engine: GenerationEngine, renderer: Renderer) -> None:
        self._engine = engine
        self._renderer = renderer

    async def generate(self, request: GroupRequest) -> SampleGroup:
        """Raises DataError when the prompt leaves no room in the context."""
        started = time.monotonic()
        rendered = self._renderer.prompt(request.prompt, request.reasoning_mode)
        sampling = SamplingRequest(
            samples=request.samples,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop_token_ids=tuple(self._renderer.stop_token_ids),
        )
        completions = await self._engine.generate(rendered.token_ids, sampling)
        samples = tuple(
            self._sample(f"{request.group_id}/{number}", rendered, completion)
            for number, completion in enumerate(completions)
        )
        return SampleGroup(request.group_id, rendered, samples, time.monotonic() - started)

    def _sample(self, sample_id: str, rendered: RenderedPrompt, completion: Completion) -> Sample:
        prompt_tokens = len(rendered.token_ids)
        loss_mask = np.ones(prompt_tokens + len(completion.token_ids), dtype=bool)
        loss_mask[:prompt_tokens] = False
        return Sample(
            sample_id=sample_id,
            token_ids=np.concatenate([rendered.token_ids, completion.token_ids]),
            loss_mask=loss_mask,
            rollout_logprobs=np.concatenate([np.zeros(prompt_tokens, np.float32), completion.logprobs]),
            version_spans=completion.version_spans,
            completion=self._renderer.completion_text(completion.token_ids, rendered.reasoning_mode),
            finish_reason=completion.finish_reason,
        )
