"""What a collect stage wrote comes back bit by bit, and what people wrote is checked record by record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from rlhf.config import PreferenceFile
from rlhf.errors import DataError
from rlhf.models import byte_tokenizer
from rlhf.preferences import Selected
from rlhf.samples import PreferenceGroup, PreferencePair, TokenizedExample
from rollouts.preference_data import load_preferences, read_selected, write_selected
from rollouts.rendering import Renderer

TOKENIZER = byte_tokenizer()
RENDERER = Renderer(TOKENIZER, max_prompt_tokens=64, max_context_tokens=128)

USER = {"role": "user", "content": "1+1=?"}
GOOD = {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}
GROUP = {"prompt": "1+1=?", "completions": ["2", "3", "4"], "rewards": [1, 0.5, 0]}


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def example_of(text: str) -> TokenizedExample:
    """A completion after a prompt, with an injected token in its middle that does not train."""
    completion = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    token_ids = np.array([5, 6, 7, *completion], dtype=np.int32)
    mask = np.arange(len(token_ids)) >= 3
    return TokenizedExample(token_ids, mask)


def selected(number: int, *texts: str, pair: bool = True) -> Selected:
    examples = tuple(example_of(text) for text in texts)
    rewards = tuple(1.0 / (place + 3) for place in range(len(texts)))
    unit_id = f"collect-{number:06d}"
    return Selected(
        unit=PreferencePair(unit_id, *examples) if pair else PreferenceGroup(unit_id, examples, rewards),
        prompt_id=f"p:{number}",
        prompt="user: 1+1=? 한글 😀",
        reasoning_mode=False,
        sample_ids=tuple(f"{unit_id}/{place}" for place in range(len(texts))),
        completions=texts,
        rewards=rewards,
        tasks=tuple(float(place == 0) for place in range(len(texts))),
        parts=tuple({"math": reward, "language": 0.1} for reward in rewards),
        completion_tokens=tuple(int(example.loss_mask.sum()) for example in examples),
    )


PAIRS = [selected(number, "2", f"no: {number}") for number in range(600)]
GROUPS = [selected(number, "2", "three", "vier", pair=False) for number in range(5)]


def assert_equal(one: TokenizedExample, other: TokenizedExample) -> None:
    assert one.token_ids.dtype == other.token_ids.dtype == np.int32
    assert one.loss_mask.dtype == other.loss_mask.dtype == bool
    assert np.array_equal(one.token_ids, other.token_ids)
    assert np.array_equal(one.loss_mask, other.loss_mask)


def assert_same(one: Selected, other: Selected) -> None:
    if isinstance(one.unit, PreferencePair) and isinstance(other.unit, PreferencePair):
        assert one.unit.pair_id == other.unit.pair_id
        assert_equal(one.unit.chosen, other.unit.chosen)
        assert_equal(one.unit.rejected, other.unit.rejected)
    else:
        assert isinstance(one.unit, PreferenceGroup) and isinstance(other.unit, PreferenceGroup)
        assert (one.unit.group_id, one.unit.rewards) == (other.unit.group_id, other.unit.rewards)
        for mine, theirs in zip(one.unit.completions, other.unit.completions, strict=True):
            assert_equal(mine, theirs)
    assert replace(one, unit=other.unit) == other


# --- the file of a collect stage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [PAIRS, GROUPS], ids=["pairs", "groups"])
def test_what_was_written_is_read_back_bit_by_bit(tmp_path: Path, records: list[Selected]) -> None:
    write_selected(tmp_path / "made" / "collect.parquet", records)
    assert [entry.name for entry in (tmp_path / "made").iterdir()] == ["collect.parquet"]
    read = read_selected(tmp_path / "made" / "collect.parquet")
    assert len(read) == len(records)
    for one, other in zip(read, records, strict=True):
        assert_same(one, other)


def test_a_mask_with_a_gap_survives(tmp_path: Path) -> None:
    record = selected(0, "two words", "3")
    assert isinstance(record.unit, PreferencePair)
    record.unit.chosen.loss_mask[5] = False
    write_selected(tmp_path / "collect.parquet", [record])
    assert_same(read_selected(tmp_path / "collect.parquet")[0], record)


def test_a_person_sees_texts_and_rewards_in_named_columns(tmp_path: Path) -> None:
    write_selected(tmp_path / "pairs.parquet", PAIRS)
    row = parquet.read_table(tmp_path / "pairs.parquet").to_pylist()[7]
    assert (row["id"], row["prompt_id"], row["prompt"]) == ("collect-000007", "p:7", "user: 1+1=? 한글 😀")
    assert (row["chosen"], row["rejected"], row["reasoning_mode"]) == ("2", "no: 7", False)
    assert (row["chosen_reward"], row["rejected_task"]) == (1 / 3, 0.0)
    assert dict(row["rejected_parts"]) == {"math": 0.25, "language": 0.1}
    assert (row["chosen_completion_tokens"], row["rejected_completion_tokens"]) == (1, 5)
    write_selected(tmp_path / "groups.parquet", GROUPS)
    row = parquet.read_table(tmp_path / "groups.parquet").to_pylist()[0]
    assert (row["completions"], row["completion_tokens"]) == (["2", "three", "vier"], [1, 5, 4])
    assert row["rewards"] == [1 / 3, 1 / 4, 1 / 5]


@pytest.mark.parametrize("records", [[], [PAIRS[0], GROUPS[0]]], ids=["nothing", "both kinds"])
def test_a_file_holds_pairs_or_groups_and_something(tmp_path: Path, records: list[Selected]) -> None:
    with pytest.raises(ValueError, match="holds pairs or groups, at least one record and not both kinds"):
        write_selected(tmp_path / "collect.parquet", records)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_taken_for_those_of_a_collect_stage(tmp_path: Path) -> None:
    write_selected(tmp_path / "collect.parquet", PAIRS[:2])
    table = parquet.read_table(tmp_path / "collect.parquet")
    parquet.write_table(table.drop_columns(["chosen_token_ids"]), tmp_path / "fewer.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for name in ("fewer", "other"):
        with pytest.raises(DataError, match=r"must be the file of a collect stage\. Its columns are others"):
            read_selected(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="must be a Parquet file"):
        read_selected(tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r'must be an existing file.*Did you mean "?collect.parquet'):
        read_selected(tmp_path / "colect.parquet")


# --- records of people ------------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., PreferenceFile]:
    """Writes records (or raw lines) and returns a source over them."""

    def write(*lines: Any, **settings: Any) -> PreferenceFile:
        file = tmp_path / "prefs.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return PreferenceFile(kind="jsonl", path=str(file), **settings)

    return write


def load(config: PreferenceFile, reasoning_mode: bool = False, renderer: Renderer = RENDERER) -> list[Any]:
    return list(load_preferences(config, renderer, reasoning_mode))


def report_of(config: PreferenceFile, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(config, **settings)
    return str(caught.value)


def trained(example: TokenizedExample) -> str:
    return str(TOKENIZER.decode(example.token_ids[example.loss_mask]))


def prompt_text(example: TokenizedExample) -> str:
    return str(TOKENIZER.decode(example.token_ids[~example.loss_mask]))


def test_a_pair_is_the_prompt_with_each_of_its_two_completions(jsonl: Callable[..., PreferenceFile]) -> None:
    first, second = load(jsonl(GOOD, {**GOOD, "chosen": "two"}))
    assert (first.pair_id, second.pair_id) == ("prefs:1", "prefs:2")
    assert (trained(first.chosen), trained(first.rejected)) == ("2[|endofturn|]", "3[|endofturn|]")
    assert trained(second.chosen) == "two[|endofturn|]"
    expected = "[|user|]\n1+1=?[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n"
    assert prompt_text(first.chosen) == prompt_text(first.rejected) == expected


def test_a_group_has_its_completions_and_rewards_in_order(jsonl: Callable[..., PreferenceFile]) -> None:
    [group] = load(jsonl(GROUP))
    assert group.group_id == "prefs:1"
    assert [trained(example) for example in group.completions] == [f"{n}[|endofturn|]" for n in (2, 3, 4)]
    assert group.rewards == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    "record",
    [
        {**GOOD, "prompt": [USER]},
        {"messages": [USER], "chosen": "2", "rejected": "3"},
        {**GOOD, "chosen": said("2"), "rejected": said("3")},
        {**GOOD, "prompt": [USER], "chosen": [USER, *said("2")], "rejected": [USER, *said("3")]},
        {**GOOD, "chosen": [USER, *said("2")], "rejected": said("3")},
        {"chosen": [USER, *said("2")], "rejected": [USER, *said("3")]},
        {**GOOD, "prompt": None, "chosen": [USER, *said("2")], "rejected": [USER, *said("3")]},
        {**GOOD, "messages": [USER, *said("2")], "score_chosen": 8.0, "completions": None, "rewards": None},
    ],
)
def test_all_forms_in_which_pairs_are_published_give_the_same_pair(
    jsonl: Callable[..., PreferenceFile], record: dict[str, Any]
) -> None:
    [expected] = load(jsonl(GOOD))
    [found] = load(jsonl(record))
    assert_equal(found.chosen, expected.chosen)
    assert_equal(found.rejected, expected.rejected)


def test_a_chat_that_ends_with_the_prompt_is_the_prompt(jsonl: Callable[..., PreferenceFile]) -> None:
    earlier = [{"role": "user", "content": "hi"}, *said("hello")]
    [whole] = load(jsonl({**GOOD, "messages": [*earlier, USER]}))
    [named] = load(jsonl({**GOOD, "prompt": [*earlier, USER]}))
    assert_equal(whole.chosen, named.chosen)
    assert "hello" in prompt_text(whole.chosen)


def test_the_system_prompt_of_the_source_comes_first(jsonl: Callable[..., PreferenceFile]) -> None:
    [pair] = load(jsonl(GOOD, system_prompt="Be brief."))
    assert prompt_text(pair.chosen).startswith("[|system|]\nBe brief.")
    turns = [{"role": "system", "content": "s"}, USER]
    assert "system_prompt is set too" in report_of(jsonl({**GOOD, "prompt": turns}, system_prompt="t"))


def test_think_blocks_train_in_reasoning_mode_and_are_left_out_without_it(jsonl: Callable[..., PreferenceFile]) -> None:
    record = {**GOOD, "chosen": "<think>\nwhy\n</think>\n\n2"}
    [reasoning], [direct] = load(jsonl(record), reasoning_mode=True), load(jsonl(record))
    assert prompt_text(reasoning.chosen).endswith("<think>\n")
    assert trained(reasoning.chosen) == "why\n</think>\n\n2[|endofturn|]"
    assert trained(reasoning.rejected) == "</think>\n\n3[|endofturn|]"
    assert trained(direct.chosen) == "2[|endofturn|]"


def test_parquet_and_data_sets_give_the_same_pairs_as_jsonl(
    jsonl: Callable[..., PreferenceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": [USER], "chosen": said(str(n)), "rejected": said("x")} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prefs.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    expected = load(jsonl(*rows))
    for kind, name in (("parquet", "prefs.parquet"), ("huggingface", "set")):
        found = load(PreferenceFile(kind=kind, path=str(tmp_path / name)))
        for one, other in zip(found, expected, strict=True):
            assert_equal(one.chosen, other.chosen)
            assert_equal(one.rejected, other.rejected)


def test_the_limit_takes_the_first_records(jsonl: Callable[..., PreferenceFile]) -> None:
    assert len(load(jsonl(GOOD, GOOD, "broken", limit=2))) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "must be one JSON object"),
        ({"prompt": "q"}, 'field "chosen" must be there: a record has chosen and rejected, or completions and rewards'),
        (
            {"prompt": "q", "chosen": "a"},
            'field "rejected" must be there: a record has chosen and rejected. The record',
        ),
        ({**GOOD, "rejected": None}, 'field "rejected" must be there: a record has chosen and rejected. It is null.'),
        ({**GOOD, "completions": ["a", "b"]}, "must have chosen and rejected, or completions and rewards, not both"),
        (GROUP, "must have the shape of the other records. Record 1 has chosen and rejected, this one completions"),
        ({**GOOD, "chosen": " "}, "field \"chosen\" must be text that is not empty. Found ' ' (str)"),
        ({**GOOD, "chosen": 2}, 'field "chosen" must be text or a list of messages. Found 2 (int)'),
        ({**GOOD, "chosen": []}, 'field "chosen" must be text or a list of messages. Found [] (list)'),
        ({**GOOD, "chosen": ["2"]}, 'field "chosen[0]" must be a message'),
        ({**GOOD, "chosen": [USER]}, 'field "chosen[0]" must be an assistant\'s turn. The last turn is from "user"'),
        ({**GOOD, "chosen": said("")}, 'field "chosen[0].content" must be text that is not empty'),
        ({**GOOD, "chosen": "3"}, 'field "chosen" must differ from "rejected". Both are the same text'),
        ({**GOOD, "chosen": "<think>a</think>3"}, "Without its <think> block each is the same text"),
        ({**GOOD, "chosen": "<think>a"}, 'field "chosen" may have one <think>...</think> block'),
        ({**GOOD, "rejected": "<think>a</think> "}, 'field "rejected" must have an answer'),
        ({"chosen": "2", "rejected": "3"}, 'field "prompt" must be there. The record has no such field'),
        ({"chosen": [USER, *said("2")], "rejected": said("3")}, 'field "prompt" must be there'),
        ({**GOOD, "prompt": 7}, 'field "prompt" must be a non-empty list of messages. Found 7 (int)'),
        ({**GOOD, "prompt": ""}, 'field "prompt" must be text that is not empty'),
        ({**GOOD, "prompt": said("q")}, 'field "prompt" must end with a user turn'),
        ({**GOOD, "chosen": [{**USER, "content": "?"}, *said("2")]}, 'field "chosen" must begin with the prompt'),
        (
            {"chosen": [USER, *said("2")], "rejected": [{**USER, "content": "?"}, *said("3")]},
            'field "rejected" must begin with the same turns as "chosen"',
        ),
        ({**GOOD, "rejected": [*said("a"), *said("3")]}, 'field "rejected" must end with a user turn'),
        ({**GOOD, "prompt": "q" * 70}, "prompt prefs:2: must have at most 64"),
        ({**GOOD, "chosen": "2" * 120}, 'field "chosen", prompt prefs:2 with its completion: must have at most 128'),
    ],
)
def test_a_malformed_pair_is_named_with_line_field_and_rule(
    jsonl: Callable[..., PreferenceFile], record: Any, message: str
) -> None:
    report = report_of(jsonl(GOOD, record))
    assert "1 of 2 records cannot be used" in report
    assert "prefs.jsonl, line 2, " in report
    assert message in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, 'field "rewards" must be there: a record has completions and rewards. It is null.'),
        ({"completions": ["2"]}, 'field "completions" must be a list of at least two'),
        ({"completions": "2"}, "Found '2' (str)"),
        ({"completions": ["2", "", "4"]}, 'field "completions[1]" must be text that is not empty'),
        ({"completions": ["2", "x</think>", "4"]}, 'field "completions[1]" may have one <think>'),
        ({"completions": ["2", "3" * 120, "4"]}, 'field "completions[1]", prompt prefs:2 with its completion'),
        ({"rewards": 1.0}, 'field "rewards" must be a list of numbers. Found 1.0 (float)'),
        ({"rewards": [1, 0]}, 'field "rewards" must have one entry for each completion. There are 3 completions and 2'),
        ({"rewards": [1, "0", 0]}, "field \"rewards[1]\" must be a finite number. Found '0' (str)"),
        ({"rewards": [1, 0, True]}, "Found True (bool)"),
        ({"rewards": [1, float("nan"), 0]}, "Found nan (float)"),
        ({"rewards": [1, 0, float("inf")]}, "Found inf (float)"),
        ({"rewards": [1, 0, None]}, "Found None (NoneType)"),
    ],
)
def test_a_malformed_group_is_named_with_line_field_and_rule(
    jsonl: Callable[..., PreferenceFile], changes: dict[str, Any], message: str
) -> None:
    report = report_of(jsonl(GROUP, GROUP | changes))
    assert "prefs.jsonl, line 2, " in report
    assert message in report


def test_an_empty_file_is_refused(jsonl: Callable[..., PreferenceFile]) -> None:
    assert "must hold at least one record" in report_of(jsonl())


def test_half_a_character_is_refused_and_a_whole_one_is_text(jsonl: Callable[..., PreferenceFile]) -> None:
    report = report_of(jsonl('{"prompt": "q", "chosen": "\\uD83D", "rejected": "3"}'))
    assert "line 1, must be text. A \\ud... escape is one half of a character" in report
    [pair] = load(jsonl('{"prompt": "q", "chosen": "\\ud83d\\ude00", "rejected": "3"}'))
    assert trained(pair.chosen) == "😀[|endofturn|]"


# --- a collect stage's file as a source -------------------------------------------------------------------------------


def collected(tmp_path: Path, records: list[Selected], **settings: Any) -> PreferenceFile:
    write_selected(tmp_path / "collect.parquet", records)
    return PreferenceFile(kind="parquet", path=str(tmp_path / "collect.parquet"), **settings)


@pytest.mark.parametrize("records", [PAIRS[:3], GROUPS[:3]], ids=["pairs", "groups"])
def test_the_file_of_a_collect_stage_is_taken_token_by_token(tmp_path: Path, records: list[Selected]) -> None:
    units = load(collected(tmp_path, records, limit=2), reasoning_mode=True)
    assert len(units) == 2
    for unit, record in zip(units, records, strict=False):
        assert_same(replace(record, unit=unit), record)


def test_tokens_of_another_tokenizer_or_too_many_are_refused(tmp_path: Path) -> None:
    other = replace(PAIRS[1], completions=("2", "something else"))
    report = report_of(collected(tmp_path, [PAIRS[0], other]))
    assert "row 2: must be of this model's tokenizer. Its tokens say something else than its text" in report
    short = Renderer(TOKENIZER, max_prompt_tokens=4, max_context_tokens=6)
    assert "row 1: must have at most 6 (model.max_context_tokens) tokens. It has 8" in report_of(
        collected(tmp_path, PAIRS[:1]), renderer=short
    )


def test_a_system_prompt_cannot_be_put_before_tokens(tmp_path: Path) -> None:
    report = report_of(collected(tmp_path, PAIRS[:1], system_prompt="Be brief."))
    assert report.startswith("system_prompt = Be brief.: must be null for")
