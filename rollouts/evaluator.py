"""Greedy and sampled completions of fixed held-out prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from rlhf.config import RunConfig
from rlhf.evaluation import EvaluationResult, summarise
from rlhf.samples import Prompt, ScoredGroup
from rollouts.generator import GroupRequest


class Runner(Protocol):
    def run(self, requests: Sequence[GroupRequest], deadline_s: float) -> list[ScoredGroup]: ...


class HeldOutEvaluator:
    """`Evaluator` over the run's engines and rewards. The same prompts every time, so figures compare."""

    def __init__(self, runner: Runner, prompts: Sequence[Prompt], config: RunConfig) -> None:
        self._runner = runner
        self._prompts = prompts
        self._config = config
        self._numbers = itertools.count()

    def evaluate(self, prompts: int, *, reasoning_mode: bool) -> EvaluationResult:
        """Statistics over the first `prompts` held-out prompts (all, where there are fewer)."""
        evaluation = self._config.evaluation
        name = f"e{next(self._numbers):04d}"
        chosen = self._prompts[:prompts]
        greedy = [self._request(f"{name}-greedy-{i}", p, reasoning_mode, 1, 0.0) for i, p in enumerate(chosen)]
        samples, temperature = evaluation.samples_per_prompt, evaluation.temperature
        sampled = [self._request(f"{name}-{i}", p, reasoning_mode, samples, temperature) for i, p in enumerate(chosen)]
        scored = self._runner.run([*greedy, *sampled], self._config.rollouts.silence_deadline_s * 4)
        return summarise(
            scored[: len(greedy)], scored[len(greedy) :], self._config.rewards.correct_at, evaluation.pass_at
        )

    def _request(
        self, group_id: str, prompt: Prompt, reasoning_mode: bool, samples: int, temperature: float
    ) -> GroupRequest:
        return GroupRequest(
            group_id=group_id,
            prompt=prompt,
            reasoning_mode=reasoning_mode,
            samples=samples,
            max_tokens=self._config.rollouts.max_completion_tokens,
            temperature=temperature,
        )
