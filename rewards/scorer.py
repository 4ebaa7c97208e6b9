"""SampleGroup -> ScoredGroup: which rewards run on a sample, how their values add up, and what a failure becomes.

A sample's outcome is its value (the weighted sum of its components), an abstention when any component abstains, or a
failure when any component has no verdict. A failure wins over an abstention: nothing may hide it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewards.processes import Call, Failure, Parameters, ProcessPool, Verdict
from rewards.registry import Abstain, RewardInput, Score, unknown_name
from rlhf.config import RewardComponent, RewardsConfig
from rlhf.errors import ConfigError
from rlhf.samples import (
    Abstained,
    Prompt,
    RenderedPrompt,
    RewardFailed,
    RewardOutcome,
    RewardValue,
    Sample,
    SampleGroup,
    ScoredGroup,
)


@dataclass(frozen=True, slots=True)
class Judged:
    """The last verdict of one component on one sample, after `attempts` tries."""

    component: str
    verdict: Verdict
    attempts: int


class Scorer:
    """Scores groups with the configured components in its own grader processes. Thread-safe; `close()` ends them.

    Raises ConfigError with every problem when a component or one of its parameters does not exist.
    """

    def __init__(self, config: RewardsConfig) -> None:
        self._components = config.components
        self._pool = ProcessPool(config.processes, config.memory_limit_mib << 20, config.modules)
        problems = component_problems(config.components, self._pool.rewards)
        if problems:
            self.close()
            raise ConfigError(problems)

    def score(self, group: SampleGroup) -> ScoredGroup:
        """The group with one outcome per sample. Raises ConfigError when its prompt names no configured component."""
        started = time.perf_counter()
        names = self._applicable(group.prompt)
        inputs = [reward_input(group.rendered, sample) for sample in group.samples]
        judged = self._judge([self._call(name, sample) for sample in inputs for name in names])
        outcomes = tuple(
            self._outcome(group.prompt, sample, judged[row * len(names) : (row + 1) * len(names)])
            for row, sample in enumerate(group.samples)
        )
        return ScoredGroup(group, outcomes, time.perf_counter() - started)

    def pids(self) -> tuple[int, ...]:
        """The process ids of the grader processes."""
        return self._pool.pids()

    def close(self) -> None:
        self._pool.close()

    def _applicable(self, prompt: Prompt) -> list[str]:
        if prompt.reward not in self._components:
            key = f"prompt {prompt.prompt_id}: reward"
            fix = "Add it to rewards.components or correct the record."
            raise ConfigError([f"{unknown_name(key, prompt.reward, self._components)} {fix}"])
        components = self._components.items()
        return [name for name, component in components if component.applies == "always" or name == prompt.reward]

    def _call(self, name: str, sample: RewardInput) -> Call:
        component = self._components[name]
        return Call(name, sample, component.params, component.deadline_s)

    def _judge(self, calls: Sequence[Call]) -> list[Judged]:
        """Every call's verdict; calls that failed by chance are made again, `retries` times at most."""
        judged = [Judged(c.component, verdict, 1) for c, verdict in zip(calls, self._pool.run(calls), strict=True)]
        while again := [row for row, item in enumerate(judged) if self._retry(item)]:
            for row, verdict in zip(again, self._pool.run([calls[row] for row in again]), strict=True):
                judged[row] = Judged(judged[row].component, verdict, judged[row].attempts + 1)
        return judged

    def _retry(self, item: Judged) -> bool:
        failed = isinstance(item.verdict, Failure) and item.verdict.transient
        return failed and item.attempts <= self._components[item.component].retries

    def _outcome(self, prompt: Prompt, sample: Sample, judged: Sequence[Judged]) -> RewardOutcome:
        for item in judged:
            if isinstance(item.verdict, Failure):
                return _failed(prompt, sample, item, item.verdict)
        for item in judged:
            if isinstance(item.verdict, Abstain):
                return Abstained(item.component, item.verdict.reason)
        return self._value(prompt, {item.component: item.verdict for item in judged if isinstance(item.verdict, Score)})

    def _value(self, prompt: Prompt, scores: Mapping[str, Score]) -> RewardValue:
        value = sum(self._components[name].weight * score.value for name, score in scores.items())
        parts = {name: score.value for name, score in scores.items()}
        for name, score in scores.items():
            parts |= {f"{name}/{part}": number for part, number in score.parts.items()}
        routed = scores[prompt.reward]
        return RewardValue(value, routed.value, parts, routed.reason)


def reward_input(rendered: RenderedPrompt, sample: Sample) -> RewardInput:
    """What a reward function sees of a sample."""
    return RewardInput.of(
        sample.completion,
        rendered.prompt.answer,
        messages=rendered.prompt.messages,
        metadata=rendered.prompt.metadata,
        truncated=sample.truncated,
        completion_tokens=sample.completion_tokens,
        reasoning_mode=rendered.reasoning_mode,
    )


def component_problems(components: Mapping[str, RewardComponent], rewards: Mapping[str, Parameters]) -> list[str]:
    """One line for each component that is not registered and each parameter its function does not take or lacks."""
    problems: list[str] = []
    for name, component in components.items():
        if name not in rewards:
            fix = "A reward of your own registers in a module named in rewards.modules."
            problems.append(f"{unknown_name('rewards.components', name, rewards)} {fix}")
        else:
            problems += _parameter_problems(f"rewards.components.{name}.params", component.params, rewards[name])
    return problems


def _parameter_problems(key: str, params: Mapping[str, object], parameters: Parameters) -> list[str]:
    known = parameters.accepts
    unknown = [] if known is None else [unknown_name(key, name, known) for name in params if name not in known]
    missing = [name for name in parameters.requires if name not in params]
    return unknown + [f"{key}.{name}: must be given. The reward has no default for it. Set it." for name in missing]


def _failed(prompt: Prompt, sample: Sample, item: Judged, failure: Failure) -> RewardFailed:
    where = f"reward {item.component!r} on sample {sample.sample_id} of prompt {prompt.prompt_id}"
    return RewardFailed(item.component, f"{where}: {failure.message}", failure.traceback, item.attempts)
