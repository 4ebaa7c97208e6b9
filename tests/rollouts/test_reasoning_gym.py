"""reasoning-gym as a source: a module of the same interface everywhere, the package where installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from random import Random
from types import ModuleType
from typing import Any

import pytest

from rlhf.config import ReasoningGymSource
from rlhf.errors import ConfigError, DataError
from rollouts.prompts import PromptStream, evaluation_prompts, open_source
from rollouts.reasoning_gym_source import split_of


class Sums:
    """Item `i` of seed `s` is item 0 of seed `s + i`, as in the package."""

    def __init__(self, seed: int, size: int, highest: int = 999) -> None:
        if highest < 1:
            raise AssertionError("highest must be at least 1")
        self._seed, self._size, self._highest = seed, size, highest

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert 0 <= index < self._size
        rng = Random(self._seed + index)
        a, b = rng.randint(0, self._highest), rng.randint(0, self._highest)
        return {"question": f"{a} + {b} =", "answer": str(a + b), "metadata": {"terms": (a, b)}, "more": object()}


class Unanswered(Sums):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "answer": None}


class Odd(Sums):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "answer": 5}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"sums": Sums, "unanswered": Unanswered, "odd": Odd}
    module, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    module.create_dataset = lambda name, **params: sets[name](**params)  # type: ignore[attr-defined]
    factory.DATASETS = sets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def config(dataset: str = "sums", **settings: Any) -> ReasoningGymSource:
    return ReasoningGymSource(kind="reasoning_gym", dataset=dataset, **{"size": 50, **settings})


@pytest.mark.usefixtures("package")
def test_a_prompt_asks_the_question_and_carries_what_the_scorer_needs() -> None:
    source = open_source(config(params={"highest": 20}))
    prompt = source.prompt(3)
    entry = prompt.metadata["entry"]
    assert prompt.messages == ({"role": "user", "content": entry["question"]},)
    assert (prompt.answer, prompt.reward) == (entry["answer"], "reasoning_gym")
    assert prompt.metadata["dataset"] == "sums"
    assert prompt.metadata["params"] == {"highest": 20}
    assert set(entry) == {"question", "answer", "metadata"}


@pytest.mark.usefixtures("package")
def test_a_source_has_so_many_different_questions_and_gives_each_once() -> None:
    source = open_source(config())
    prompts = evaluation_prompts(source, 1000)
    assert source.size == len(prompts) == len({prompt.prompt_id for prompt in prompts}) == 50
    assert [source.prompt(index) for index in range(50)] == prompts


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("other_seed", [0, 1, 17])
def test_the_splits_share_no_question_whatever_their_seeds(other_seed: int) -> None:
    """With seeds alone they would: seed 1 has the problems of seed 0, one place further on."""
    train = evaluation_prompts(open_source(config(size=300)), 300)
    held_out = evaluation_prompts(open_source(config(size=300, split="held_out", seed=other_seed)), 300)
    questions = [{prompt.messages[0]["content"] for prompt in prompts} for prompts in (train, held_out)]
    assert not questions[0] & questions[1]
    assert all(split_of("sums", question) == "held_out" for question in questions[1])


@pytest.mark.usefixtures("package")
def test_the_same_settings_give_the_same_source_and_others_another_one() -> None:
    source = open_source(config())
    assert open_source(config()).fingerprint == source.fingerprint
    for changed in (config(seed=1), config(size=51), config(params={"highest": 99}), config(split="held_out")):
        assert open_source(changed).fingerprint != source.fingerprint


@pytest.mark.usefixtures("package")
def test_a_stream_shuffles_the_problems_and_can_be_resumed() -> None:
    stream = PromptStream(open_source(config()), seed=4)
    first = [stream.next().prompt_id for _ in range(20)]
    resumed = PromptStream(open_source(config()), seed=4)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    rest = [stream.next().prompt_id for _ in range(30)]
    assert [resumed.next().prompt_id for _ in range(30)] == rest
    assert len({*first, *rest}) == 50


@pytest.mark.usefixtures("package")
def test_a_demonstration_is_the_answer_and_an_error_where_there_is_none() -> None:
    source = open_source(config())
    assert source.demonstration(7).content == source.prompt(7).answer
    unanswered = open_source(config("unanswered"))
    assert unanswered.prompt(0).answer == ""
    with pytest.raises(DataError, match=r"dataset = unanswered: must have answers for SFT"):
        unanswered.demonstration(0)


@pytest.mark.usefixtures("package")
def test_a_data_set_with_too_few_problems_is_refused_with_their_number() -> None:
    with pytest.raises(DataError, match=r"size = 50: must not exceed .* with these params has [1-9]\. Lower size"):
        open_source(config(params={"highest": 3}))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "sumz"}, "dataset = sumz: must be a data set of reasoning-gym. There is none. Did you mean sums?"),
        ({"params": {"seed": 3}}, "params.seed: must not be given. The source sets it. Set seed beside params."),
        ({"params": {"hihgest": 3}}, "unexpected keyword argument 'hihgest'"),
        ({"params": {"highest": 0}}, "must fit the data set sums. highest must be at least 1. Correct them"),
    ],
)
def test_wrong_settings_are_told_by_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(config(**settings))
    assert message in str(caught.value)


@pytest.mark.usefixtures("package")
def test_an_answer_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="dataset = odd: must give texts"):
        open_source(config("odd"))


def test_without_the_package_the_error_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r'pip install "groupwise\[reasoning-gym\]"'):
        open_source(config())


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize("dataset", ["chain_sum", "countdown", "rubiks_cube", "list_functions", "gsm_symbolic"])
def test_data_sets_of_the_package_give_disjoint_splits(dataset: str) -> None:
    found = {}
    for split in ("train", "held_out"):
        source = open_source(config(dataset, split=split, size=20))
        found[split] = {source.prompt(index).messages[0]["content"] for index in range(20)}
        assert source.fingerprint == open_source(config(dataset, split=split, size=20)).fingerprint
    assert not found["train"] & found["held_out"]
