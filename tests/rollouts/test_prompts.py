import json

import pytest

from rlhf.config import Columns, JsonlSource, ProceduralSource
from rlhf.errors import ConfigError, DataError
from rollouts.prompts import PromptStream, SelectedPrompts, evaluation_prompts, open_source
from rollouts.tasks import get_family


def procedural(**settings) -> ProceduralSource:
    return ProceduralSource(kind="procedural", **settings)


@pytest.fixture
def records(tmp_path):
    def write(count=7, columns=None, **settings):
        file = tmp_path / "tasks.jsonl"
        rows = [{"q": f"question {n}", "a": str(n), "w": f"<think>r{n}</think>{n}"} for n in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = columns or Columns(prompt="q", answer="a", completion="w")
        return JsonlSource(kind="jsonl", path=str(file), columns=columns, reward="math", **settings)

    return write


def take(stream: PromptStream, count: int) -> list[str]:
    return [stream.next().prompt_id for _ in range(count)]


def test_a_procedural_prompt_is_one_user_turn_verified_by_math():
    prompt = open_source(procedural(families=("addition",))).prompt(0)
    [message] = prompt.messages
    assert message["role"] == "user"
    assert message["content"].endswith("=?")
    assert prompt.reward == "math"
    assert prompt.prompt_id == "addition:" + message["content"].removesuffix("=?")
    assert prompt.metadata == {"family": "addition", "difficulty": 2}


def test_families_take_equal_parts():
    source = open_source(procedural())
    families = [source.prompt(index).metadata["family"] for index in range(30)]
    assert {name: families.count(name) for name in set(families)} == {
        "addition": 10,
        "subtraction": 10,
        "three_term_sum": 10,
    }


def test_a_procedural_source_stays_in_its_split():
    for split in ("train", "held_out"):
        source = open_source(procedural(split=split))
        for index in range(300):
            prompt = source.prompt(index)
            family = get_family(prompt.metadata["family"])
            operands = [int(part) for part in prompt.messages[0]["content"][:-2].replace("-", "+").split("+")]
            assert family.split_of(family.pose(*operands)) == split


def test_streams_of_the_two_splits_share_no_problem():
    def key(prompt_id):
        family, _, question = prompt_id.partition(":")
        return family, question if "-" in question else tuple(sorted(question.split("+")))

    train = PromptStream(open_source(procedural(split="train", seed=1)), seed=2)
    held_out = PromptStream(open_source(procedural(split="held_out", seed=3)), seed=4)
    assert not {key(i) for i in take(train, 4000)} & {key(i) for i in take(held_out, 1000)}


def test_the_trace_fraction_decides_how_many_demonstrations_reason():
    for fraction in (0.0, 0.4, 1.0):
        source = open_source(procedural(trace_fraction=fraction))
        demonstrations = [source.demonstration(index) for index in range(1000)]
        share = sum(bool(demonstration.reasoning) for demonstration in demonstrations) / 1000
        assert share == pytest.approx(fraction, abs=0.05)
        assert all(demonstration.content == demonstration.prompt.answer for demonstration in demonstrations)
        assert demonstrations[17] == source.demonstration(17)


def test_prompt_and_demonstration_of_an_index_are_the_same_problem():
    source = open_source(procedural())
    assert all(source.prompt(index) == source.demonstration(index).prompt for index in range(100))


def test_the_default_families_have_four_hundred_distinct_held_out_prompts_in_equal_parts():
    source = open_source(procedural(split="held_out"))
    prompts = evaluation_prompts(source, 400)
    assert len({prompt.prompt_id for prompt in prompts}) == 400
    families = [prompt.metadata["family"] for prompt in prompts]
    assert sorted(families.count(name) for name in set(families)) == [133, 133, 134]
    assert evaluation_prompts(source, 400) == prompts


def test_a_small_family_gives_all_its_held_out_prompts():
    source = open_source(procedural(families=("addition",), difficulty=1, split="held_out"))
    prompts = evaluation_prompts(source, 400)
    assert 0 < len(prompts) < 55
    drawn = {source.prompt(index).prompt_id for index in range(500)}
    assert len(drawn) >= len(prompts)


def test_evaluation_prompts_of_a_file_are_fixed_and_distinct(records):
    source = open_source(records(count=30))
    prompts = evaluation_prompts(source, 10)
    assert len({prompt.prompt_id for prompt in prompts}) == 10
    assert evaluation_prompts(open_source(records(count=30)), 10) == prompts
    assert len(evaluation_prompts(source, 100)) == 30
    in_order = evaluation_prompts(open_source(records(count=30, shuffle=False)), 3)
    assert [prompt.prompt_id for prompt in in_order] == ["tasks:1", "tasks:2", "tasks:3"]


def test_unknown_and_repeated_families_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        open_source(procedural(families=("adition", "gdc", "modulo", "modulo")))
    assert len(caught.value.problems) == 3
    assert "Did you mean addition?" in caught.value.problems[0]


def test_every_epoch_of_a_shuffled_file_has_every_record_in_a_new_order(records):
    stream = PromptStream(open_source(records(count=20)), seed=0)
    epochs = [take(stream, 20) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_unshuffled_file_repeats_in_file_order(records):
    stream = PromptStream(open_source(records(count=3, shuffle=False)), seed=0)
    assert take(stream, 5) == ["tasks:1", "tasks:2", "tasks:3", "tasks:1", "tasks:2"]


@pytest.mark.parametrize("taken", [0, 1, 7, 25])
@pytest.mark.parametrize("kind", ["procedural", "shuffled", "ordered"])
def test_a_resumed_stream_goes_on_exactly_where_it_was(records, kind, taken):
    config = procedural() if kind == "procedural" else records(shuffle=kind == "shuffled")
    stream = PromptStream(open_source(config), seed=3)
    take(stream, taken)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(open_source(config), seed=3)
    resumed.load_state_dict(state)
    assert take(resumed, 30) == take(stream, 30)


def test_the_seed_of_a_stream_changes_its_prompts(records):
    for config in (procedural(), records(count=20)):
        assert take(PromptStream(open_source(config), 0), 10) != take(PromptStream(open_source(config), 1), 10)


def test_a_stream_refuses_the_state_of_another_source_or_seed(records):
    state = PromptStream(open_source(records(count=7)), seed=0).state_dict()
    with pytest.raises(DataError, match=r"data source .* must be the one of the checkpoint"):
        PromptStream(open_source(records(count=8)), seed=0).load_state_dict(state)
    with pytest.raises(DataError, match="seed of the prompt stream must be"):
        PromptStream(open_source(records(count=7)), seed=1).load_state_dict(state)


def test_the_fingerprint_follows_the_content_not_the_place(records, tmp_path):
    source = records()
    moved = tmp_path / "elsewhere" / "tasks.jsonl"
    moved.parent.mkdir()
    moved.write_text((tmp_path / "tasks.jsonl").read_text())
    assert open_source(source).fingerprint == open_source(source.model_copy(update={"path": str(moved)})).fingerprint
    assert open_source(procedural()).fingerprint != open_source(procedural(difficulty=3)).fingerprint


def test_demonstrations_of_a_file_are_split_into_reasoning_and_content(records):
    stream = PromptStream(open_source(records(shuffle=False)), seed=0)
    demonstration = stream.next_demonstration()
    assert (demonstration.reasoning, demonstration.content) == ("r0", "0")
    assert stream.next().prompt_id == "tasks:2"


def test_demonstrations_need_a_completion_column(records):
    source = open_source(records(columns=Columns(prompt="q", answer="a")))
    with pytest.raises(DataError, match=r"columns\.completion must be set for SFT"):
        source.demonstration(0)


def test_hasty_demonstrations_are_wrong_only_where_something_is_carried_and_never_where_they_reason():
    careful, hasty = (open_source(procedural(trace_fraction=0.5, hasty_fraction=share)) for share in (0.0, 1.0))
    differing = 0
    for index in range(300):
        right, quick = careful.demonstration(index), hasty.demonstration(index)
        assert right.content == right.prompt.answer
        assert quick.prompt == right.prompt
        if quick.reasoning:
            assert quick == right
        differing += quick.content != right.content
    assert 50 < differing < 150


def test_selected_prompts_are_those_of_the_indices_in_their_order(records):
    source = open_source(records(7))
    selected = SelectedPrompts(source, [5, 0, 3])
    assert selected.size == 3
    assert [selected.prompt(i).answer for i in range(3)] == ["5", "0", "3"]
    assert [prompt.answer for prompt in selected.distinct()] == ["5", "0", "3"]
    assert selected.demonstration(2) == source.demonstration(3)


def test_a_stream_over_selected_prompts_gives_each_once_an_epoch_and_resumes(records):
    selected = SelectedPrompts(open_source(records(7)), [1, 2, 4, 6])
    stream = PromptStream(selected, seed=3)
    ids = take(stream, 6)
    assert sorted(ids[:4]) == [f"tasks:{number}" for number in (2, 3, 5, 7)]
    again = PromptStream(selected, seed=3)
    again.load_state_dict(stream.state_dict())
    assert take(again, 9) == take(stream, 9)


def test_selected_prompts_of_an_endless_source_are_finite_shuffled_and_distinct():
    source = open_source(procedural(families=("addition",), difficulty=1))
    selected = SelectedPrompts(source, range(500))
    assert selected.size == 500
    assert selected.shuffled
    ids = [prompt.prompt_id for prompt in selected.distinct()]
    assert len(ids) == len(set(ids)) < 500


def test_selected_prompts_keep_the_order_of_a_source_that_keeps_it(records):
    selected = SelectedPrompts(open_source(records(5, shuffle=False)), [4, 1])
    assert not selected.shuffled
    assert take(PromptStream(selected, seed=0), 4) == ["tasks:5", "tasks:2", "tasks:5", "tasks:2"]


def test_the_fingerprint_of_selected_prompts_depends_on_the_source_and_the_indices(records):
    source, other = open_source(records(5, seed=0)), open_source(records(5, seed=1))
    selections = [SelectedPrompts(s, i) for s in (source, other) for i in ([0, 1], [1, 0], [0, 2])]
    assert len({selected.fingerprint for selected in selections}) == 6
    assert SelectedPrompts(source, [0, 1]).fingerprint == selections[0].fingerprint


def test_a_selection_of_nothing_is_refused(records):
    with pytest.raises(DataError, match=r"prompts = 0: a selection must keep at least one prompt\. .*drop_at_least"):
        SelectedPrompts(open_source(records(5)), [])


def test_a_family_brings_its_reward_and_what_the_reward_reads():
    prompt = open_source(procedural(families=("program", "constrained"))).prompt(0)
    assert prompt.reward == "code"
    assert prompt.metadata["family"] == "program"
    assert prompt.metadata["tests"][0].keys() == {"call", "args", "expected"}
    prompt = open_source(procedural(families=("constrained",))).prompt(0)
    assert prompt.reward == "instruction_following"
    assert len(prompt.metadata["instruction_id_list"]) == len(prompt.metadata["kwargs"]) == 3


def test_a_source_may_name_another_reward_for_all_its_families():
    own, judged = open_source(procedural()), open_source(procedural(reward="judge"))
    assert {judged.prompt(index).reward for index in range(6)} == {"judge"}
    assert judged.prompt(0).messages == own.prompt(0).messages
    assert judged.fingerprint != own.fingerprint


def test_hasty_programs_leave_the_last_term_out():
    source = open_source(procedural(families=("program",), trace_fraction=0.0, hasty_fraction=1.0))
    demonstration = source.demonstration(3)
    assert demonstration.content != demonstration.prompt.answer
    assert demonstration.prompt.answer.startswith(demonstration.content.removesuffix("\n```"))
