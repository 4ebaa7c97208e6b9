"""Completions of given prompts with the current policy, scored: what filter and collect stages look at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rlhf.config import RunConfig
from rlhf.samples import Prompt, ScoredGroup
from rollouts.evaluator import Runner
from rollouts.generator import GroupRequest

GROUPS_IN_FLIGHT = 256


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sampling has come. `total` is None where the prompts are not counted beforehand."""

    done: int
    total: int | None


class PromptSampler:
    """Samples every prompt `samples` times at `temperature`; all other sampling settings are those of the run.

    At most `groups_in_flight` groups are asked for at once, so what waits in memory does not grow with the prompts.
    """

    def __init__(
        self,
        runner: Runner,
        config: RunConfig,
        *,
        stage: str,
        samples: int,
        temperature: float,
        groups_in_flight: int = GROUPS_IN_FLIGHT,
    ) -> None:
        self._runner = runner
        self._config = config
        self._stage = stage
        self._samples = samples
        self._temperature = temperature
        self._groups_in_flight = groups_in_flight

    def sample(
        self,
        prompts: Iterable[Prompt],
        *,
        reasoning_mode: Callable[[int], bool],
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> Iterator[ScoredGroup]:
        """One scored group a prompt, in their order, with group ids `<stage>-<000000>`.

        `reasoning_mode(i)` says in which mode the i-th prompt is asked. `progress` is called after every chunk.
        """
        total = len(prompts) if isinstance(prompts, list | tuple) else None
        numbered = enumerate(prompts)
        done = 0
        while chunk := list(itertools.islice(numbered, self._groups_in_flight)):
            requests = [self._request(number, prompt, reasoning_mode(number)) for number, prompt in chunk]
            scored = self._runner.run(requests, self._config.rollouts.silence_deadline_s * 4)
            done += len(scored)
            progress(Progress(done, total))
            yield from scored

    def _request(self, number: int, prompt: Prompt, reasoning_mode: bool) -> GroupRequest:
        rollouts = self._config.rollouts
        return GroupRequest(
            group_id=f"{self._stage}-{number:06d}",
            prompt=prompt,
            reasoning_mode=reasoning_mode,
            samples=self._samples,
            max_tokens=rollouts.max_completion_tokens,
            temperature=self._temperature,
            top_p=rollouts.top_p,
            top_k=rollouts.top_k,
        )
