"""Greedy and sampled completions of fixed held-out prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rlhf.config import RunConfig
from rlhf.evaluation import EvaluationResult, summarise
from rlhf.samples import Prompt
from rollouts.engine import Sampling
from rollouts.generator import GroupRequest
from rollouts.sampler import Runner


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
        name, chosen = f"e{next(self._numbers):04d}", self._prompts[:prompts]
        tokens = self._config.rollouts.max_completion_tokens
        # The full distribution at its own temperature, whatever the rollouts are sampled with.
        greedy = Sampling(1, tokens, 0.0)
        sampled = Sampling(evaluation.samples_per_prompt, tokens, evaluation.temperature)
        requests = [
            *(GroupRequest(f"{name}-greedy-{i}", p, reasoning_mode, greedy) for i, p in enumerate(chosen)),
            *(GroupRequest(f"{name}-{i}", p, reasoning_mode, sampled) for i, p in enumerate(chosen)),
        ]
        scored = list(self._runner.sample(requests))
        first, rest = scored[: len(chosen)], scored[len(chosen) :]
        return summarise(first, rest, self._config.rewards.correct_at, evaluation.pass_at)
