from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlhf.samples import Prompt, RenderedPrompt, TextSample, VersionSpan
from rollouts.engine import Completion, Sampling
from rollouts.generator import Generated, Generator, GroupRequest

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


Asked = tuple[str, list[int], Sampling, tuple[int, ...]]


class Engine:
    def __init__(self, completions: Sequence[Completion] = COMPLETIONS) -> None:
        self.completions = list(completions)
        self.asked: list[Asked] = []

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: Sampling, stop_token_ids: Sequence[int]
    ) -> list[Completion]:
        self.asked.append((request_id, list(prompt_token_ids), sampling, tuple(stop_token_ids)))
        return self.completions


class Renderer:
    stop_token_ids = (2, 9)

    def prompt(self, prompt: Prompt, reasoning_mode: bool) -> RenderedPrompt:
        return RenderedPrompt(prompt, np.array([11, 12, 13], np.int32), reasoning_mode)

    def completion_text(self, token_ids: Sequence[int], reasoning_mode: bool) -> str:
        return ("<think>" if reasoning_mode else "") + "-".join(map(str, token_ids))


def generate(engine: Any, reasoning_mode: bool = True, **settings: Any) -> Generated:
    sampling = Sampling(**{"samples": 2, "max_tokens": 8, "temperature": 0.7, **settings})
    request = GroupRequest("g1", PROMPT, reasoning_mode, sampling)
    return asyncio.run(Generator(engine, Renderer()).generate(request))  # type: ignore[arg-type]


def test_tokens_and_log_probs_are_kept_exactly_as_the_engine_returned_them() -> None:
    tokens = generate(Engine()).tokens
    assert tokens.token_ids.tolist() == [11, 12, 13, 7, 2, 11, 12, 13, 5, 5, 5]
    assert tokens.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.25, 0, 0, 0, -1.0, -2.0, -3.0]
    assert tokens.offsets.tolist() == [0, 5, 11]
    assert (tokens.token_ids.dtype, tokens.rollout_logprobs.dtype) == (np.int32, np.float32)
    assert tokens.example(1).token_ids.tolist() == [11, 12, 13, 5, 5, 5]


def test_only_completion_tokens_are_on_the_loss_mask() -> None:
    made = generate(Engine())
    assert made.tokens.loss_mask.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 3
    assert [(one.prompt_tokens, one.completion_tokens) for one in made.samples] == [(3, 2), (3, 3)]


def test_versions_finish_reasons_and_ids_travel_along() -> None:
    made = generate(Engine())
    first, second = made.samples
    assert (first.sample_id, second.sample_id) == ("g1/0", "g1/1")
    assert first.version_spans == SPANS
    assert (first.first_version, made.text.version) == (3, 3)
    assert (first.truncated, second.truncated) == (False, True)
    assert made.seconds >= 0


def test_the_text_is_all_that_a_reward_needs_decoded_in_the_mode_the_prompt_was_rendered_in() -> None:
    text = generate(Engine(), True).text
    assert (text.group_id, text.prompt, text.reasoning_mode) == ("g1", PROMPT, True)
    assert text.samples[0] == TextSample("g1/0", "<think>7-2", 2, False)
    assert text.samples[1] == TextSample("g1/1", "<think>5-5-5", 3, True)
    assert generate(Engine(), False).text.samples[0].completion == "7-2"


def test_what_the_driver_sees_does_not_grow_with_the_tokens() -> None:
    sizes = []
    for length in (10, 10_000):
        one = completion([5] * length, [-1.0] * length, "stop", (VersionSpan(3, 0, length),))
        sizes.append(len(pickle.dumps(generate(Engine([one]), samples=1).samples)))
    assert sizes[1] - sizes[0] < 16


def test_the_engine_is_asked_for_what_the_request_says() -> None:
    engine = Engine()
    generate(engine, top_p=0.9, top_k=5)
    assert engine.asked == [("g1", [11, 12, 13], Sampling(2, 8, 0.7, top_p=0.9, top_k=5), (2, 9))]


def test_an_empty_completion_is_a_sample_without_trained_tokens() -> None:
    made = generate(Engine([completion([], [], "stop", ())]), samples=1)
    assert (made.samples[0].completion_tokens, made.text.version) == (0, 0)
    assert made.tokens.token_ids.tolist() == [11, 12, 13]


def test_an_engine_that_loses_a_log_prob_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout_logprobs has shape"):
        generate(Engine([completion([7, 2], [-0.5], "stop", SPANS)]))


def test_requests_run_side_by_side() -> None:
    class Waiting(Engine):
        async def generate(self, request_id: str, *_: Any) -> list[Completion]:
            self.asked.append((request_id, [], Sampling(1, 1, 0.0), ()))
            while len(self.asked) < 3:
                await asyncio.sleep(0)
            return self.completions

    generator = Generator(Waiting(), Renderer())  # type: ignore[arg-type]
    requests = [GroupRequest(f"g{i}", PROMPT, False, Sampling(2, 8, 1.0)) for i in range(3)]

    async def together() -> list[Generated]:
        return await asyncio.wait_for(asyncio.gather(*map(generator.generate, requests)), 5)

    assert [made.text.group_id for made in asyncio.run(together())] == ["g0", "g1", "g2"]
