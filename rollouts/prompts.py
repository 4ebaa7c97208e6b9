"""Where prompts come from: sources that answer by index, and the stream that walks one and can be resumed.

A source is a pure function of an index, so the whole state of a stream is one integer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from rlhf.config import ProceduralSource, ReasoningGymSource, SourceConfig
from rlhf.errors import ConfigError, DataError
from rlhf.samples import Demonstration, Prompt
from rollouts.reasoning_gym_source import ReasoningGymPrompts
from rollouts.records import Record, load_records
from rollouts.rows import FileSource
from rollouts.tasks import Problem, TaskFamily, digest, get_family


class PromptSource(Protocol):
    """Prompts by index. `size` None = endless. `fingerprint` changes with anything that changes a prompt.

    `shuffled`: a stream takes the prompts of a finite source in a new order each epoch.
    """

    size: int | None
    shuffled: bool
    fingerprint: str

    def prompt(self, index: int) -> Prompt: ...

    def demonstration(self, index: int) -> Demonstration:
        """Prompt `index` with a worked answer; raises DataError where the source has none."""
        ...

    def distinct(self) -> Iterator[Prompt]:
        """Every prompt once, always in the same order."""
        ...


def open_source(config: SourceConfig) -> PromptSource:
    """The source, with every record read and checked. Raises ConfigError or DataError."""
    if isinstance(config, ProceduralSource):
        return ProceduralPrompts(config)
    if isinstance(config, ReasoningGymSource):
        return ReasoningGymPrompts(config)
    return RecordPrompts(config)


def evaluation_prompts(source: PromptSource, count: int) -> list[Prompt]:
    """The same `count` different prompts at every call; all there are if the source has fewer."""
    prompts: list[Prompt] = []
    for prompt in source.distinct():
        if len(prompts) == count:
            break
        prompts.append(prompt)
    return prompts


class ProceduralPrompts:
    """An endless source of one split of some task families, which take turns."""

    size: int | None = None
    shuffled = False

    def __init__(self, config: ProceduralSource) -> None:
        self._config = config
        self._families = _families(config)
        self.fingerprint = _fingerprint(config.model_dump(mode="json"))

    def prompt(self, index: int) -> Prompt:
        return self._prompt(*self._draw(index))

    def demonstration(self, index: int) -> Demonstration:
        """A share `trace_fraction` of the indices has the worked trace and the right answer.

        The others have no reasoning, and a share `hasty_fraction` of them the answer of somebody in a hurry.
        """
        family, problem = self._draw(index)
        prompt = self._prompt(family, problem)
        if self._happens("trace", index, self._config.trace_fraction):
            return Demonstration(prompt, problem.trace, problem.answer)
        hasty = problem.hasty and self._happens("hasty", index, self._config.hasty_fraction)
        return Demonstration(prompt, "", problem.hasty if hasty else problem.answer)

    def _happens(self, what: str, index: int, fraction: float) -> bool:
        return digest(what, self._config.seed, index) < fraction * 2**64

    def distinct(self) -> Iterator[Prompt]:
        """The families in turn; one that has no more problems is passed over."""
        config = self._config
        walks = {family: family.distinct(config.difficulty, config.split, config.seed) for family in self._families}
        while walks:
            for family in list(walks):
                problem = next(walks[family], None)
                if problem is None:
                    del walks[family]
                else:
                    yield self._prompt(family, problem)

    def _draw(self, index: int) -> tuple[TaskFamily, Problem]:
        family = self._families[index % len(self._families)]
        return family, family.draw(self._config.difficulty, self._config.split, self._config.seed, index)

    def _prompt(self, family: TaskFamily, problem: Problem) -> Prompt:
        return Prompt(
            prompt_id=f"{family.name}:{problem.question.removesuffix('=?')}",
            messages=({"role": "user", "content": problem.question},),
            answer=problem.answer,
            reward=self._config.reward or family.reward,
            metadata={"family": family.name, "difficulty": self._config.difficulty, **problem.metadata},
        )


def _families(config: ProceduralSource) -> tuple[TaskFamily, ...]:
    """The families by name, each known to have a problem in the split; raises ConfigError with all that is wrong."""
    families, problems = [], []
    for name in config.families:
        try:
            family = get_family(name)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        families.append(family)
        if next(family.distinct(config.difficulty, config.split, config.seed), None) is None:
            fix = "Raise the difficulty or leave the family out."
            reason = f"At difficulty {config.difficulty} {name} has none"
            problems.append(f"split = {config.split}: each family must have a problem in it. {reason}. {fix}")
    if len(set(config.families)) < len(config.families):
        problems.append(f"families = {', '.join(config.families)}: must be different. One occurs twice. Remove it.")
    if problems:
        raise ConfigError(problems)
    return tuple(families)


class RecordPrompts:
    """A finite source: the records of a file or data set, held in memory."""

    def __init__(self, config: FileSource) -> None:
        self._config = config
        self._records = load_records(config)
        self.size: int | None = len(self._records)
        self.shuffled = config.shuffle
        self.fingerprint = _fingerprint([config.shuffle, config.seed, [_plain(record) for record in self._records]])

    def prompt(self, index: int) -> Prompt:
        return self._records[index].prompt

    def demonstration(self, index: int) -> Demonstration:
        record = self._records[index]
        if record.completion is None:
            reason = "This source has prompts only"
            fix = "Set columns.completion to the column with the worked answers, or remove the SFT stage."
            raise DataError(f"{self._config.path}: columns.completion must be set for SFT. {reason}. {fix}")
        return Demonstration(record.prompt, record.completion.reasoning, record.completion.content)

    def distinct(self) -> Iterator[Prompt]:
        """In file order, or in one fixed shuffled order where the source is shuffled."""
        order = range(len(self._records))
        for index in _shuffled(order, self.fingerprint, "evaluation") if self.shuffled else order:
            yield self._records[index].prompt


class SelectedPrompts:
    """Some prompts of another source, in the order of `indices`: a finite source, whatever the other one is.

    A stream shuffles them unless the other source is one that keeps its order. Raises DataError where there are none.
    """

    def __init__(self, source: PromptSource, indices: Sequence[int]) -> None:
        if not indices:
            fix = "Relax the filter (drop_at_least, drop_at_most) or give it more prompts."
            raise DataError(f"prompts = 0: a selection must keep at least one prompt. None is left. {fix}")
        self._source = source
        self._indices = tuple(indices)
        self.size: int | None = len(self._indices)
        self.shuffled = source.shuffled or source.size is None
        self.fingerprint = _fingerprint([source.fingerprint, self._indices])

    def prompt(self, index: int) -> Prompt:
        return self._source.prompt(self._indices[index])

    def demonstration(self, index: int) -> Demonstration:
        return self._source.demonstration(self._indices[index])

    def distinct(self) -> Iterator[Prompt]:
        """In the order of the indices; a prompt that an endless source repeats comes once."""
        seen: set[str] = set()
        for prompt in map(self._source.prompt, self._indices):
            if prompt.prompt_id not in seen:
                seen.add(prompt.prompt_id)
                yield prompt


def _plain(record: Record) -> list[Any]:
    prompt, completion = record.prompt, record.completion
    worked = None if completion is None else [completion.reasoning, completion.content]
    return [prompt.prompt_id, prompt.messages, prompt.answer, prompt.reward, dict(prompt.metadata), worked]


def _fingerprint(value: Any) -> str:
    return f"{digest(json.dumps(value, sort_keys=True, default=repr)):016x}"


def _shuffled(indices: range, *key: object) -> list[int]:
    """An order that depends on the key only: the same on every machine and Python version."""
    return sorted(indices, key=lambda index: digest("shuffle", *key, index))


class PromptStream:
    """Walks a source for ever: a finite one epoch after epoch, an endless one from a place the seed decides.

    Two streams with one source, seed and cursor go on identically; `state_dict` is that cursor and what it belongs to.
    """

    def __init__(self, source: PromptSource, seed: int) -> None:
        self._source = source
        self._seed = seed
        self._cursor = 0
        self._epoch_order: tuple[int, list[int]] | None = None

    def next(self) -> Prompt:
        return self._source.prompt(self._advance())

    def at(self, position: int) -> Prompt:
        """The prompt that `next` gives when so many were drawn before it."""
        return self._source.prompt(self._index(position))

    def next_demonstration(self) -> Demonstration:
        return self._source.demonstration(self._advance())

    def state_dict(self) -> dict[str, int | str]:
        return {"cursor": self._cursor, "seed": self._seed, "source": self._source.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next prompt is the one that followed when `state` was taken; raises DataError for another stream's."""
        for key, mine, what in (
            ("source", self._source.fingerprint, "data source (its settings or its records)"),
            ("seed", self._seed, "seed of the prompt stream"),
        ):
            if state[key] != mine:
                reason = f"The checkpoint has {state[key]}, this run {mine}"
                fix = "Resume with what the checkpoint was made with, or start a new run."
                raise DataError(f"prompt stream: the {what} must be the one of the checkpoint. {reason}. {fix}")
        self._cursor = int(state["cursor"])

    def _advance(self) -> int:
        """The index at the cursor, which moves on."""
        self._cursor += 1
        return self._index(self._cursor - 1)

    def _index(self, position: int) -> int:
        if self._source.size is None:
            return digest("stream", self._seed) % 2**48 + position
        epoch, place = divmod(position, self._source.size)
        return self._order(epoch)[place] if self._source.shuffled else place

    def _order(self, epoch: int) -> list[int]:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            assert self._source.size is not None
            indices = range(self._source.size)
            self._epoch_order = epoch, _shuffled(indices, self._source.fingerprint, self._seed, epoch)
        return self._epoch_order[1]
