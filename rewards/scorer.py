"""TextGroup -> Scores: which rewards run on a sample, how their values add up, and what a failure becomes.

A sample's outcome is its value (the weighted sum of its components), an abstention when any component abstains, or a
failure when any component has no verdict. A failure wins over an abstention: nothing may hide it. A component whose
gate is closed adds nothing, and its abstention does not matter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rewards.cache import AnswerCache, content_key
from rewards.foreign import Foreign
from rewards.metrics import ScorerMetrics
from rewards.processes import Answer, Call, Failure, Health, Parameters, ProcessPool, Verdict
from rewards.registry import Abstain, RewardInput, Score, unknown_name
from rlhf.config import ROUTED, RewardComponent, RewardsConfig
from rlhf.errors import ConfigError
from rlhf.samples import (
    Abstained,
    Prompt,
    RewardFailed,
    RewardOutcome,
    RewardValue,
    Scores,
    TextGroup,
    TextSample,
)

BACKOFF_S = 0.5  # before the second attempt after an error that its author calls transient; doubles each time
MAX_BACKOFF_S = 30.0
MAX_WAIT_S = 60.0  # for what a server asks for; it may ask for days


@dataclass(frozen=True, slots=True)
class Judged:
    """The last verdict of one component on one sample, after `attempts` tries."""

    component: str
    verdict: Verdict
    attempts: int


class Scorer:
    """Scores groups with the configured components in its own grader processes. Thread-safe; `close()` ends them.

    Raises ConfigError with every problem when a component, one of its parameters or a package it needs does not exist.
    """

    def __init__(self, config: RewardsConfig) -> None:
        self._components = config.components
        self._correct_at = config.correct_at
        self._cache = AnswerCache(config.cache_entries)
        self._metrics = ScorerMetrics()
        self._pool = ProcessPool(
            config.process_count,
            config.memory_limit_mib << 20,
            config.modules,
            foreign=brought(config.components),
            async_calls=config.async_calls,
        )
        problems = component_problems(config.components, self._pool.rewards)
        if problems:
            self.close()
            raise ConfigError(problems)

    def score(self, group: TextGroup) -> Scores:
        """One outcome for each sample. Raises ConfigError when the prompt names no configured component."""
        started = time.perf_counter()
        names = self._applicable(group.prompt)
        inputs = tuple(reward_input(group, sample) for sample in group.samples)
        calls = [call for name in names for call in self._calls(name, inputs)]
        judged = self._judged(calls)  # component by component, each in the order of the samples
        of_sample = [judged[row :: len(inputs)] for row in range(len(inputs))]
        outcomes = tuple(self._outcome(group.prompt, group.version, verdicts) for verdicts in of_sample)
        return Scores(outcomes, time.perf_counter() - started)

    def metrics(self) -> Mapping[str, float]:
        """Counts since the start and latencies of the latest calls, as `ScorerMetrics` names them."""
        return self._metrics.metrics()

    def health(self) -> Health:
        """Has every idle grader process answer a canary."""
        return self._pool.health()

    @property
    def rewards(self) -> Mapping[str, Parameters]:
        """What the grader processes have registered, by name."""
        return self._pool.rewards

    def pids(self) -> tuple[int, ...]:
        """The process ids of the grader processes."""
        return self._pool.pids()

    def close(self) -> None:
        self._pool.close()

    # --- which calls --------------------------------------------------------------------------------------------------

    def _applicable(self, prompt: Prompt) -> list[str]:
        if prompt.reward not in self._components:
            key = f"prompt {prompt.prompt_id}: reward"
            fix = "Add it to rewards.components or correct the record."
            raise ConfigError([f"{unknown_name(key, prompt.reward, self._components)} {fix}"])
        return [name for name, part in self._components.items() if name == prompt.reward or _is_meant(part, prompt)]

    def _calls(self, name: str, inputs: tuple[RewardInput, ...]) -> list[Call]:
        component = self._components[name]
        seen = [inputs] if self._pool.rewards[name].group else inputs
        return [Call(name, one, component.params, component.deadline_s) for one in seen]

    # --- their verdicts -----------------------------------------------------------------------------------------------

    def _judged(self, calls: Sequence[Call]) -> list[Judged]:
        """A verdict for each sample of each call; equal calls are made once."""
        self._metrics.queued(len(calls))
        try:
            keys = [self._key(row, call) for row, call in enumerate(calls)]
            answers = {key: (answer, 1) for key in keys if (answer := self._cached(key)) is not None}
            missing = {key: call for key, call in zip(keys, calls, strict=True) if key not in answers}
            made = dict(zip(missing, self._made(list(missing.values())), strict=True))
        finally:
            self._metrics.queued(-len(calls))
        for key, (answer, _) in made.items():
            if isinstance(key, bytes):
                self._cache.put(key, answer)
        return [item for key, call in zip(keys, calls, strict=True) for item in self._items(call, key, answers, made)]

    def _items(
        self, call: Call, key: Hashable, cached: Mapping[Hashable, Made], made: dict[Hashable, Made]
    ) -> Iterator[Judged]:
        answer, attempts = cached[key] if key in cached else made[key]
        self._metrics.answered(call.component, answer, cached=key in cached)
        for verdict in answer.verdicts:
            yield Judged(call.component, verdict, attempts)

    def _key(self, row: int, call: Call) -> Hashable:
        """What equal calls have in common; of a call that is always made, its place."""
        component = self._components[call.component]
        if not component.cache:
            return row
        source = (component.path, component.url, component.style, component.conversational)
        return content_key(call, (self._pool.rewards[call.component].version, *source))

    def _cached(self, key: Hashable) -> Answer | None:
        return self._cache.get(key) if isinstance(key, bytes) else None

    def _made(self, calls: Sequence[Call]) -> list[Made]:
        """Every call's answer and its attempts; those that may end differently are made `retries` times again."""
        answers, attempts = self._attempt(calls, retry=False), [1] * len(calls)
        while again := [row for row, call in enumerate(calls) if self._retry(call, answers[row], attempts[row])]:
            if waiting := [row for row in again if _kind(answers[row]) == "transient"]:
                time.sleep(max(_wait_s(answers[row], attempts[row]) for row in waiting))
            for row, answer in zip(again, self._attempt([calls[row] for row in again], retry=True), strict=True):
                answers[row], attempts[row] = answer, attempts[row] + 1
        return list(zip(answers, attempts, strict=True))

    def _attempt(self, calls: Sequence[Call], *, retry: bool) -> list[Answer]:
        answers = self._pool.answers(calls)
        for call, answer in zip(calls, answers, strict=True):
            self._metrics.called(call.component, answer, retry=retry)
        return answers

    def _retry(self, call: Call, answer: Answer, attempts: int) -> bool:
        failure = answer.failure
        return failure is not None and failure.transient and attempts <= self._components[call.component].retries

    # --- what they add up to ------------------------------------------------------------------------------------------

    def _outcome(self, prompt: Prompt, version: int, judged: Sequence[Judged]) -> RewardOutcome:
        """What a sample of a group comes to; `version`, of the whole group, says what each component weighs."""
        for item in judged:
            if isinstance(item.verdict, Failure):
                return self._failed(item, item.verdict)
        scores = {item.component: item.verdict for item in judged if isinstance(item.verdict, Score)}
        for item in judged:
            matters = item.component == prompt.reward or self._counts(item.component, scores, prompt)
            if isinstance(item.verdict, Abstain) and matters:
                return Abstained(item.component, item.verdict.reason)
        # One weight for the whole group: its rewards are compared with each other.
        return self._value(prompt, scores, version)

    def _counts(self, name: str, scores: Mapping[str, Score], prompt: Prompt) -> bool:
        """The component has no gate, or an open one: that ran, counts itself and says that the sample is correct."""
        gate = self._components[name].gate
        if gate is None:
            return True
        gate = prompt.reward if gate == ROUTED else gate
        return gate in scores and scores[gate].value >= self._correct_at and self._counts(gate, scores, prompt)

    def _value(self, prompt: Prompt, scores: Mapping[str, Score], version: int) -> RewardValue:
        value, parts = 0.0, {name: score.value for name, score in scores.items()}
        for name, score in scores.items():
            counts = self._counts(name, scores, prompt)
            value += _contribution(self._components[name], score.value, version) if counts else 0.0
            parts |= {f"{name}/{part}": number for part, number in score.parts.items()}
            parts |= {f"{name}/counted": float(counts)} if self._components[name].gate else {}
        routed = scores[prompt.reward]
        return RewardValue(value, routed.value, parts, routed.reason)

    def _failed(self, item: Judged, failure: Failure) -> RewardFailed:
        name = item.component
        return RewardFailed(
            component=name,
            message=failure.message.removeprefix(f"reward {name!r} "),
            traceback=failure.traceback,
            attempts=item.attempts,
            kind=failure.kind,
            params=self._components[name].params,
            whole_group=self._pool.rewards[name].group,
        )


Made = tuple[Answer, int]


def backoff_s(attempts: int) -> float:
    """The wait after so many attempts: doubling, with jitter so that many callers do not come back at once."""
    return min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** (attempts - 1)) * random.uniform(0.5, 1.5)


def brought(components: Mapping[str, RewardComponent]) -> list[Foreign]:
    """The components that name a function or a server of their own."""
    names = ("style", "path", "url", "low", "high", "conversational")
    return [
        Foreign(name, **{field: getattr(part, field) for field in names})
        for name, part in components.items()
        if not part.registered
    ]


def _is_meant(component: RewardComponent, prompt: Prompt) -> bool:
    """A component for all samples, or for those of a source that is the prompt's."""
    source = {**prompt.metadata, "reward": prompt.reward}
    matches = all(key in source and source[key] in values for key, values in component.where.items())
    return component.applies == "always" and matches


def _contribution(component: RewardComponent, value: float, version: int) -> float:
    weighted = component.weight_at(version) * value
    bound = component.max_bonus
    return weighted if bound is None else min(bound, max(-bound, weighted))


def _wait_s(answer: Answer, attempts: int) -> float:
    """How long to wait after so many attempts: as `backoff_s`, and as long as the server asks."""
    asked_s = answer.failure.wait_s if answer.failure is not None else 0.0
    return max(backoff_s(attempts), min(MAX_WAIT_S, asked_s))


def _kind(answer: Answer) -> str:
    return answer.failure.kind if answer.failure is not None else ""


def reward_input(group: TextGroup, sample: TextSample) -> RewardInput:
    """What a reward function sees of a sample."""
    return RewardInput.of(
        sample.completion,
        group.prompt.answer,
        messages=group.prompt.messages,
        metadata=group.prompt.metadata,
        truncated=sample.truncated,
        completion_tokens=sample.completion_tokens,
        reasoning_mode=group.reasoning_mode,
    )


def component_problems(components: Mapping[str, RewardComponent], rewards: Mapping[str, Parameters]) -> list[str]:
    """One line for each component that is not registered, parameter it does not take or lacks, and missing package."""
    problems: list[str] = []
    for name, component in components.items():
        if name not in rewards:
            fix = "A reward of your own registers in a module named in rewards.modules."
            problems.append(f"{unknown_name('rewards.components', name, rewards)} {fix}")
            continue
        problems += _parameter_problems(f"rewards.components.{name}.params", component.params, rewards[name])
        if missing := rewards[name].missing_packages:
            rule = f"needs {' and '.join(missing)}, which is not installed. The reward declares it"
            problems.append(f"rewards.components.{name} = {{...}}: {rule}. Install it: pip install {' '.join(missing)}")
    return problems


def _parameter_problems(key: str, params: Mapping[str, object], parameters: Parameters) -> list[str]:
    known = parameters.accepts
    unknown = [] if known is None else [unknown_name(key, name, known) for name in params if name not in known]
    missing = [name for name in parameters.requires if name not in params]
    return unknown + [f"{key}.{name}: must be given. The reward has no default for it. Set it." for name in missing]
