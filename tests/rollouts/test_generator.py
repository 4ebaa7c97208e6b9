from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlhf.samples import Prompt, RenderedPrompt, SampleGroup, VersionSpan
from rollouts.engine import Completion, SamplingRequest
from rollouts.generator import Generator, GroupRequest

PROMPT = Prompt("p", ({"role": "user", "content": "1+1=?"},), "2", "math")
SPANS = (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2))


def completion(
    token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: Any, spans: tuple[VersionSpan, ...]
) -> Completion:
    return Completion(np.array(token_ids, np.int32), np.array(logprobs, np.float32), finish_reason, spans)


COMPLETIONS = [
    completion([7, 2], [-0.5, -0.25], "stop", SPANS),
    completion([5, 5, 5], [-1.0, -2.0, -3.0], "length", (VersionSpan(3, 0, 3),)),
]


class Engine:
    def __init__(self, completions: Sequence[Completion] = COMPLETIONS) -> None:
        self.completions = list(completions)
        self.asked: list[tuple[list[int], SamplingRequest]] = []

    async def generate(self, prompt_token_ids: Sequence[int], request: SamplingRequest) -> list[Completion]:
        self.asked.append((list(prompt_token_ids), request))
        return self.completions


class Renderer:
    stop_token_ids = (2, 9)

    def prompt(self, prompt: Prompt, reasoning_mode: bool) -> RenderedPrompt:
        return RenderedPrompt(prompt, np.array([11, 12, 13], np.int32), reasoning_mode)

    def completion_text(self, token_ids: Sequence[int], reasoning_mode: bool) -> str:
        return ("<think>" if reasoning_mode else "") + "-".join(map(str, token_ids))


def generate(engine: Any, reasoning_mode: bool = True, **settings: Any) -> SampleGroup:
    chosen = {"samples": 2, "max_tokens": 8, "temperature": 0.7, **settings}
    request = GroupRequest("g1", PROMPT, reasoning_mode, **chosen)
    return asyncio.run(Generator(engine, Renderer()).generate(request))  # type: ignore[arg-type]


def test_tokens_and_log_probs_are_kept_exactly_as_the_engine_returned_them() -> None:
    group = generate(Engine())
    first, second = group.samples
    assert first.token_ids.tolist() == [11, 12, 13, 7, 2]
    assert first.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.25]
    assert second.token_ids.tolist() == [11, 12, 13, 5, 5, 5]
    assert (first.token_ids.dtype, first.rollout_logprobs.dtype) == (np.int32, np.float32)


def test_only_completion_tokens_are_on_the_loss_mask() -> None:
    first, second = generate(Engine()).samples
    assert first.loss_mask.tolist() == [False] * 3 + [True] * 2
    assert (first.completion_tokens, second.completion_tokens) == (2, 3)


def test_versions_finish_reasons_and_ids_travel_along() -> None:
    group = generate(Engine())
    first, second = group.samples
    assert (first.sample_id, second.sample_id) == ("g1/0", "g1/1")
    assert first.version_spans == SPANS
    assert (first.first_version, group.first_version) == (3, 3)
    assert (first.truncated, second.truncated) == (False, True)
    assert group.prompt is PROMPT
    assert group.generate_s >= 0


def test_the_text_is_decoded_in_the_mode_the_prompt_was_rendered_in() -> None:
    assert generate(Engine(), True).samples[0].completion == "<think>7-2"
    assert generate(Engine(), False).samples[0].completion == "7-2"


def test_the_engine_is_asked_for_what_the_request_says() -> None:
    engine = Engine()
    generate(engine, top_p=0.9, top_k=5)
    expected = SamplingRequest(2, 8, 0.7, (2, 9), top_p=0.9, top_k=5)
    assert engine.asked == [([11, 12, 13], expected)]


def test_an_empty_completion_is_a_sample_without_trained_tokens() -> None:
    [sample] = generate(Engine([completion([], [], "stop", ())]), samples=1).samples
    assert sample.completion_tokens == 0
    assert sample.token_ids.tolist() == [11, 12, 13]


def test_an_engine_that_loses_a_log_prob_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout_logprobs has shape"):
        generate(Engine([completion([7, 2], [-0.5], "stop", SPANS)]))


def test_requests_run_side_by_side() -> None:
    class Waiting(Engine):
        async def generate(self, prompt_token_ids: Sequence[int], request: SamplingRequest) -> list[Completion]:
            self.asked.append(([], request))
            while len(self.asked) < 3:
                await asyncio.sleep(0)
            return self.completions

    generator = Generator(Waiting(), Renderer())  # type: ignore[arg-type]
    requests = [GroupRequest(f"g{i}", PROMPT, False, 2, 8, 1.0) for i in range(3)]

    async def together() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*map(generator.generate, requests)), 5)

    assert [group.group_id for group in asyncio.run(together())] == ["g0", "g1", "g2"]
