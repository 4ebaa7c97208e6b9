"""The actors of the driver's benchmark. They import little, so that a hundred of them fit one machine."""

from __future__ import annotations

import asyncio

import numpy as np

from rlhf.samples import GroupTokens, RewardValue, Sample, Scores, TextGroup, TextSample, VersionSpan
from rollouts.generator import Facts, GroupRequest

WAIT_S = 0.02


class WaitingEngine:
    """An engine that waits and returns completions of `length` tokens."""

    def __init__(self, length: int) -> None:
        self._length = length

    async def generate(self, request: GroupRequest) -> tuple[Facts, GroupTokens, TextGroup]:
        await asyncio.sleep(WAIT_S)
        count, length = request.sampling.samples, self._length
        spans = (VersionSpan(0, 0, length),)
        ids = [f"{request.group_id}/{number}" for number in range(count)]
        samples = tuple(Sample(sample_id, 16, length, spans, "stop") for sample_id in ids)
        whole = 16 + length
        tokens = GroupTokens(
            token_ids=np.zeros(count * whole, np.int32),
            loss_mask=np.tile(np.arange(whole) >= 16, count),
            rollout_logprobs=np.zeros(count * whole, np.float32),
            offsets=np.arange(count + 1) * whole,
        )
        texts = tuple(TextSample(sample_id, "word " * (length * 4 // 5), length, False) for sample_id in ids)
        return Facts(samples, WAIT_S), tokens, TextGroup(request.group_id, request.prompt, False, 0, texts)

    async def abort(self, group_id: str) -> None: ...


class WaitingGrader:
    def score(self, group: TextGroup) -> Scores:
        return Scores(tuple(RewardValue(float(n % 2), float(n % 2), {}) for n in range(len(group.samples))), 0.0)
