import json

import pyarrow
import pytest
from pyarrow import parquet

from rlhf.config import Columns, HuggingFaceSource, JsonlSource, ParquetSource
from rlhf.errors import ConfigError, DataError
from rollouts.records import Completion, load_records

QUESTIONS = Columns(prompt="question", answer="answer")
CHATS = Columns(messages="messages", answer="answer")
GOOD = {"question": "1+1=?", "answer": "2"}


@pytest.fixture
def jsonl(tmp_path):
    """Writes lines (objects or raw text) and returns a source over them."""

    def write(*lines, columns=QUESTIONS, reward="math", **settings):
        file = tmp_path / "tasks.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return JsonlSource(kind="jsonl", path=str(file), columns=columns, reward=reward, **settings)

    return write


def problem_of(source) -> str:
    with pytest.raises(DataError) as caught:
        load_records(source)
    return str(caught.value)


def test_a_record_becomes_a_prompt(jsonl):
    columns = Columns(prompt="question", answer="answer", reward="judge", metadata=("level",))
    source = jsonl({**GOOD, "judge": "exact", "level": 3}, columns=columns, system_prompt="Be brief.")
    [record] = load_records(source)
    assert record.prompt.prompt_id == "tasks:1"
    assert record.prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1=?"},
    )
    assert (record.prompt.answer, record.prompt.reward, record.prompt.metadata) == ("2", "exact", {"level": 3})
    assert record.completion is None


def test_messages_are_taken_over_in_order(jsonl):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v", "name": None},
    ]
    [record] = load_records(jsonl({"messages": turns, "answer": "2"}, columns=CHATS))
    assert [message["content"] for message in record.prompt.messages] == ["s", "u", "a", "v"]
    assert set(record.prompt.messages[-1]) == {"role", "content"}


def test_a_number_is_an_answer(jsonl):
    records = load_records(jsonl({**GOOD, "answer": 2}, {**GOOD, "answer": 2.5}))
    assert [record.prompt.answer for record in records] == ["2", "2.5"]


def test_the_answer_is_group_one_of_the_last_match(jsonl):
    answer = "#### 1 is wrong\n#### 72"
    [record] = load_records(jsonl({**GOOD, "answer": answer}, answer_pattern=r"#### (\S+)"))
    assert record.prompt.answer == "72"


def test_without_an_answer_column_the_answer_is_empty(jsonl):
    [record] = load_records(jsonl(GOOD, columns=Columns(prompt="question")))
    assert record.prompt.answer == ""


def test_the_limit_takes_the_first_records_and_reads_no_further(jsonl):
    assert len(load_records(jsonl(GOOD, GOOD, "broken", limit=2))) == 2


def test_identical_records_have_different_ids(jsonl):
    records = load_records(jsonl(GOOD, GOOD, GOOD))
    assert len({record.prompt.prompt_id for record in records}) == 3


def test_a_record_without_its_reward_column_takes_the_default(jsonl):
    columns = Columns(prompt="question", answer="answer", reward="reward")
    records = load_records(jsonl(GOOD, {**GOOD, "reward": None}, {**GOOD, "reward": "code"}, columns=columns))
    assert [record.prompt.reward for record in records] == ["math", "math", "code"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text", Completion("", "just text")),
        ("<think>\n1+1=2\n</think>\n\n2", Completion("1+1=2", "2")),
        ("\n<think>why</think>2\n", Completion("why", "2\n")),
        ("<think>\n\n</think>\n\n2", Completion("", "2")),
    ],
)
def test_a_completion_is_split_into_reasoning_and_content(jsonl, text, expected):
    columns = Columns(prompt="question", answer="answer", completion="worked")
    [record] = load_records(jsonl({**GOOD, "worked": text}, columns=columns))
    assert record.completion == expected


@pytest.mark.parametrize(
    "text",
    ["<think>open", "closed</think>2", "<think>a</think><think>b</think>2", "x <think>a</think>2", "</think><think>2"],
)
def test_broken_think_tags_are_refused(jsonl, text):
    columns = Columns(prompt="question", answer="answer", completion="worked")
    assert 'line 1, field "worked" may have one <think>...</think> block' in problem_of(
        jsonl({**GOOD, "worked": text}, columns=columns)
    )


def test_a_think_block_without_an_answer_is_refused(jsonl):
    columns = Columns(prompt="question", answer="answer", completion="worked")
    assert "Nothing follows </think>" in problem_of(jsonl({**GOOD, "worked": "<think>a</think>\n"}, columns=columns))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": ', "must be one JSON object. Expecting value at column 14"),
        ("", "must be one JSON object. The line is blank"),
        ("[1, 2]", "must be one JSON object. Found [1, 2] (list)"),
        ('{"answer": "1", "answer": "2"}', 'field "answer" must occur once'),
        ({"questoin": "1+1=?", "answer": "2"}, 'The record has no such field. Did you mean questoin?'),
        ({"question": " ", "answer": "2"}, 'field "question" must be text that is not empty. Found \' \' (str)'),
        ({"question": 7, "answer": "2"}, 'field "question" must be text that is not empty. Found 7 (int)'),
        ({"question": "1+1=?"}, 'field "answer" must be there'),
        ({**GOOD, "answer": None}, 'field "answer" must be text that is not empty, or a finite number. Found None'),
        ({**GOOD, "answer": True}, "Found True (bool)"),
        ({**GOOD, "answer": [2]}, "Found [2] (list)"),
        ('{"question": "q", "answer": NaN}', "Found nan (float)"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named_with_line_field_and_finding(jsonl, line, message):
    report = problem_of(jsonl(GOOD, line))
    assert "tasks.jsonl, line 2, " in report
    assert message in report


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, 'field "messages" must be a non-empty list of messages'),
        ([], "must be a non-empty list of messages"),
        ("hello", "Found 'hello' (str)"),
        (["hello"], 'field "messages[0]" must be a message'),
        ([{"content": "q"}], 'field "messages[0].role" must be text. It has none'),
        ([{"role": "user"}], 'field "messages[0].content" must be text. It has none'),
        ([{"role": "user", "content": 5}], "must be text. Found 5 (int)"),
        ([{"role": "human", "content": "q"}], "must be one of system, user, assistant, tool"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], 'turn is from "assistant"'),
        ([{"role": "user", "content": "q"}, {"role": "system", "content": "s"}], "system only for the first message"),
        ([{"role": "user", "content": "  "}], "must not end with an empty prompt"),
        ([{"role": "user", "content": "q", "tool_calls": [1]}], 'field "messages[0].tool_calls" is not read'),
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(jsonl, messages, message):
    assert message in problem_of(jsonl({"messages": messages, "answer": "2"}, columns=CHATS))


def test_two_system_prompts_are_refused(jsonl):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    source = jsonl({"messages": turns, "answer": "2"}, columns=CHATS, system_prompt="t")
    assert "system_prompt is set too" in problem_of(source)


def test_a_record_that_names_no_reward_is_refused(jsonl):
    columns = Columns(prompt="question", answer="answer", reward="reward")
    report = problem_of(jsonl({**GOOD, "rewards": "math"}, columns=columns, reward=None))
    assert 'field "reward" must name the reward' in report
    assert "Did you mean rewards?" in report
    assert "(int)" in problem_of(jsonl({**GOOD, "reward": 3}, columns=columns))


def test_an_answer_that_does_not_match_the_pattern_is_refused(jsonl):
    assert "must match answer_pattern" in problem_of(jsonl(GOOD, answer_pattern=r"#### (.+)"))


def test_ten_problems_are_shown_and_all_are_counted(jsonl):
    report = problem_of(jsonl(GOOD, *["nonsense"] * 25))
    assert "25 of 26 records cannot be used (the first 10 are shown)" in report
    assert report.count("tasks.jsonl, line") == 10


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "q", "answer": "1"}\n{"question": "\xe9"}\n')
    source = JsonlSource(kind="jsonl", path=str(tmp_path / "latin.jsonl"), columns=QUESTIONS, reward="math")
    assert "line 2, must be UTF-8. Byte 15" in problem_of(source)


def test_an_empty_file_is_refused(jsonl):
    assert "must hold at least one record" in problem_of(jsonl())


def test_a_missing_file_is_refused_with_the_nearest_name(jsonl, tmp_path):
    jsonl(GOOD)
    source = JsonlSource(kind="jsonl", path=str(tmp_path / "task.jsonl"), reward="math")
    assert "must be an existing file" in problem_of(source)
    assert "Did you mean tasks.jsonl?" in problem_of(source)
    nowhere = JsonlSource(kind="jsonl", path=str(tmp_path / "nowhere" / "task.jsonl"), reward="math")
    assert "There is no directory" in problem_of(nowhere)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": Columns(prompt="p", messages="m")}, "columns = both of messages and prompt"),
        ({"columns": Columns(answer="a")}, "columns = neither of messages and prompt"),
        ({"reward": None}, "reward = null: must be set where columns.reward is not"),
        ({"answer_pattern": "(["}, r"answer_pattern = \(\[: must be a regular expression"),
        ({"answer_pattern": "#+"}, "must have a group"),
        ({"answer_pattern": "(a)", "columns": Columns(prompt="p")}, "needs columns.answer"),
    ],
)
def test_impossible_settings_are_refused_before_any_record_is_read(jsonl, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_records(jsonl(GOOD, **settings))


def test_parquet_gives_the_same_prompts_as_jsonl(jsonl, tmp_path):
    turns = [{"role": "user", "content": "1+1=?"}]
    rows = [{"messages": turns, "answer": str(number)} for number in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tasks.parquet")
    source = ParquetSource(kind="parquet", path=str(tmp_path / "tasks.parquet"), columns=CHATS, reward="math")
    assert load_records(source) == load_records(jsonl(*rows, columns=CHATS))


def test_parquet_problems_name_the_row(tmp_path):
    rows = [GOOD, {"question": None, "answer": "2"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tasks.parquet")
    source = ParquetSource(kind="parquet", path=str(tmp_path / "tasks.parquet"), columns=QUESTIONS, reward="math")
    assert 'tasks.parquet, row 2, field "question"' in problem_of(source)


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "tasks.parquet").write_text("not parquet")
    source = ParquetSource(kind="parquet", path=str(tmp_path / "tasks.parquet"), columns=QUESTIONS, reward="math")
    assert "must be a Parquet file" in problem_of(source)


def test_data_sets_load_from_disk_and_through_load_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    saved = datasets.Dataset.from_list([GOOD, {**GOOD, "answer": "3"}])
    saved.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "raw").mkdir()
    saved.to_parquet(str(tmp_path / "raw" / "train.parquet"))
    for name in ("plain", "splits", "raw"):
        source = HuggingFaceSource(kind="huggingface", path=str(tmp_path / name), columns=QUESTIONS, reward="math")
        assert [record.prompt.answer for record in load_records(source)] == ["2", "3"]
    wrong = source.model_copy(update={"path": str(tmp_path / "splits"), "split": "trian"})
    assert "split = trian: " in problem_of(wrong)
    assert "Did you mean train?" in problem_of(wrong)
    missing = source.model_copy(update={"path": str(tmp_path / "raw"), "split": "test"})
    assert "must be a data set that can be loaded" in problem_of(missing)
