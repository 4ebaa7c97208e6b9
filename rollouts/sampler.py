"""Scored completions of given prompts with the current policy, for filter and collect stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rlhf.config import RunConfig
from rlhf.samples import Prompt, ScoredGroup
from rollouts.engine import Sampling
from rollouts.generator import GroupRequest


class Runner(Protocol):
    """Samples and scores groups; see `Dispatcher`."""

    def sample(self, requests: Iterable[GroupRequest]) -> Iterator[ScoredGroup]:
        """The groups of `requests`, in their order."""
        ...


def sample_prompts(
    runner: Runner,
    config: RunConfig,
    prompts: Iterable[Prompt],
    *,
    stage: str,
    samples: int,
    temperature: float,
    reasoning_mode: Callable[[int], bool],
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[ScoredGroup]:
    """One scored group a prompt, in their order, with group ids `<stage>-<000000>`.

    Every prompt is sampled `samples` times at `temperature`; all other sampling settings are those of the run.
    `reasoning_mode(i)` says in which mode the i-th prompt is asked. `progress` is told how many groups are done.
    """
    sampling = Sampling.of(config, samples=samples, temperature=temperature)
    requests = (
        GroupRequest(f"{stage}-{number:06d}", prompt, reasoning_mode(number), sampling)
        for number, prompt in enumerate(prompts)
    )
    for done, scored in enumerate(runner.sample(requests), start=1):
        progress(done)
        yield scored
