"""Problems of reasoning-gym (extra `reasoning-gym`): generated once when the source is opened, then held in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlhf.config import ReasoningGymSource
from rlhf.errors import ConfigError, DataError, did_you_mean
from rlhf.samples import Demonstration, Prompt
from rollouts.tasks import Split, digest

_DRAWS_PER_PROBLEM = 4  # half of the draws belong to the other split, some repeat a question
_SPARE_DRAWS = 200
_OWN_SETTINGS = ("seed", "size")

Entry = Mapping[str, Any]


class ReasoningGymPrompts:
    """A finite source: the first `size` different problems of one split of a data set.

    A prompt's metadata is what the reward `reasoning_gym` needs: `dataset`, `params` and the whole `entry`. Item `i` of
    a data set with seed `s` is item `0` of seed `s + i`, so seeds alone would not keep two splits apart; a hash of the
    question does, whatever the seed. A few data sets walk over sets of strings and give other problems in each process
    unless PYTHONHASHSEED is set; the fingerprint then differs, and a checkpoint is refused.
    """

    shuffled = True

    def __init__(self, config: ReasoningGymSource) -> None:
        """Raises ConfigError where the package or the data set is missing or its params are wrong, else DataError."""
        self._config = config
        self._entries = _entries(config)
        self.size: int | None = len(self._entries)
        shown = [(entry["question"], entry["answer"]) for entry in self._entries]
        settings = config.model_dump(mode="json")
        self.fingerprint = f"{digest(json.dumps([settings, shown], sort_keys=True, default=repr)):016x}"

    def prompt(self, index: int) -> Prompt:
        config, entry = self._config, self._entries[index]
        return Prompt(
            prompt_id=f"{config.dataset}:{digest(entry['question']):016x}",
            messages=({"role": "user", "content": entry["question"]},),
            answer=entry["answer"] or "",
            reward=config.reward,
            metadata={"dataset": config.dataset, "params": config.params, "entry": entry},
        )

    def demonstration(self, index: int) -> Demonstration:
        """The answer without reasoning. Raises DataError for a problem that comes without one."""
        prompt = self.prompt(index)
        if not prompt.answer:
            fix = "Remove the SFT stage or give it data of its own."
            raise DataError(f"dataset = {self._config.dataset}: must have answers for SFT. This one has none. {fix}")
        return Demonstration(prompt, "", prompt.answer)

    def distinct(self) -> Iterator[Prompt]:
        for index in range(len(self._entries)):
            yield self.prompt(index)


def split_of(dataset: str, question: str) -> Split:
    """Half of the questions are held out: generating them is what costs, and there is no end of them."""
    return "held_out" if digest("split", dataset, question) % 2 else "train"


def _entries(config: ReasoningGymSource) -> list[Entry]:
    draws = _DRAWS_PER_PROBLEM * config.size + _SPARE_DRAWS
    found: dict[str, Entry] = {}
    with _seeded(config.seed):
        dataset = _create(config, draws)
        for number in range(draws):
            entry = _checked(config, dataset[number])
            if split_of(config.dataset, entry["question"]) == config.split:
                found.setdefault(entry["question"], entry)
            if len(found) == config.size:
                return list(found.values())
    rule = f"must not exceed the different problems of the split in {draws} draws"
    fix = "Lower size, or widen the data set with params."
    raise DataError(f"size = {config.size}: {rule}. {config.dataset} with these params has {len(found)}. {fix}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Some data sets also draw from the global generator; the caller's state of it is left as it was."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _create(config: ReasoningGymSource, size: int) -> Any:
    """The data set. Raises ConfigError."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        reason = f"It cannot be imported: {error}"
        fix = 'Run: pip install "groupwise[reasoning-gym]".'
        raise ConfigError([f"kind = reasoning_gym: needs the package reasoning-gym. {reason}. {fix}"]) from error
    if config.dataset not in DATASETS:
        hint = did_you_mean(config.dataset, DATASETS)
        raise ConfigError([f"dataset = {config.dataset}: must be a data set of reasoning-gym. There is none. {hint}"])
    if taken := [name for name in _OWN_SETTINGS if name in config.params]:
        reason = "The source sets it"
        raise ConfigError([f"params.{name}: must not be given. {reason}. Set {name} beside params." for name in taken])
    try:
        return reasoning_gym.create_dataset(config.dataset, seed=config.seed, size=size, **config.params)
    except (TypeError, ValueError, AssertionError) as error:  # unknown names, wrong types and broken rules
        fix = f"Correct them, see the fields of the configuration of {config.dataset}."
        rule = f"must fit the data set {config.dataset}"
        raise ConfigError([f"params = {config.params}: {rule}. {str(error).rstrip('.')}. {fix}"]) from error


def _checked(config: ReasoningGymSource, entry: Any) -> Entry:
    question, answer = entry["question"], entry["answer"]
    if isinstance(question, str) and question.strip() and (answer is None or isinstance(answer, str)):
        return {"question": question, "answer": answer, "metadata": entry["metadata"]}
    found = f"question {question!r:.60}, answer {answer!r:.60}"
    raise DataError(f"dataset = {config.dataset}: must give texts. Found {found}. Use another data set.")
