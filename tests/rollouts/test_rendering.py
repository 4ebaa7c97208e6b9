import numpy as np
import pytest

from rlhf.config import ProceduralSource
from rlhf.errors import DataError
from rlhf.models import byte_tokenizer
from rlhf.samples import Demonstration, Prompt
from rollouts.prompts import open_source
from rollouts.rendering import Renderer

PROMPT = Prompt("p:1", ({"role": "user", "content": "47+38=?"},), "85", "math")
WORKED = Demonstration(PROMPT, "7+8=15,4+3+1=8", "85")
BARE = Demonstration(PROMPT, "", "85")

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}[|endofturn|]\n{% endfor %}"
NO_REASONING = TURN + "{% if add_generation_prompt %}<assistant>{% endif %}"
ALWAYS_OPENED = TURN + "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
OPENED_BY_THE_POLICY = (
    TURN + "{% if add_generation_prompt %}<assistant>"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer, max_prompt_tokens=64, max_context_tokens=128)


def with_template(template: str | None) -> Renderer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, max_prompt_tokens=64, max_context_tokens=128)


def trained_text(tokenizer, example) -> str:
    return tokenizer.decode(example.token_ids[example.loss_mask])


@pytest.mark.parametrize(
    ("mode", "tail"), [(True, "<think>\n"), (False, "<think>\n\n</think>\n\n")], ids=["reasoning", "direct"]
)
def test_a_prompt_renders_to_the_template_of_its_mode(renderer, tokenizer, mode, tail):
    rendered = renderer.prompt(PROMPT, mode)
    assert tokenizer.decode(rendered.token_ids) == "[|user|]\n47+38=?[|endofturn|]\n[|assistant|]\n" + tail
    assert rendered.token_ids.dtype == np.int32
    assert rendered.reasoning_mode is mode


def test_the_template_of_the_tiny_model_supports_reasoning(renderer, tokenizer):
    assert renderer.supports_reasoning
    assert renderer.stop_token_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("demonstration", "mode", "completion"),
    [
        (WORKED, True, "7+8=15,4+3+1=8\n</think>\n\n85[|endofturn|]"),
        (BARE, True, "</think>\n\n85[|endofturn|]"),
        (WORKED, False, "85[|endofturn|]"),
    ],
)
def test_a_demonstration_trains_what_the_policy_should_sample(renderer, tokenizer, demonstration, mode, completion):
    example = renderer.demonstration(demonstration, mode)
    assert trained_text(tokenizer, example) == completion
    prompt_ids = renderer.prompt(PROMPT, mode).token_ids
    assert np.array_equal(example.token_ids[~example.loss_mask], prompt_ids)
    assert np.array_equal(example.token_ids[: len(prompt_ids)], prompt_ids)
    assert example.token_ids[-1] == tokenizer.eos_token_id


def test_the_completion_of_a_demonstration_reads_as_a_whole_think_block(renderer):
    example = renderer.demonstration(WORKED, True)
    text = renderer.completion_text(example.token_ids[example.loss_mask], True)
    assert text == "<think>\n7+8=15,4+3+1=8\n</think>\n\n85"
    direct = renderer.demonstration(WORKED, False)
    assert renderer.completion_text(direct.token_ids[direct.loss_mask], False) == "85"


def test_a_completion_after_a_rendered_prompt_is_what_a_demonstration_gives(renderer):
    for mode in (True, False):
        completed = renderer.completion(renderer.prompt(PROMPT, mode), WORKED.reasoning, WORKED.content)
        assert np.array_equal(completed.token_ids, renderer.demonstration(WORKED, mode).token_ids)
        assert np.array_equal(completed.loss_mask, renderer.demonstration(WORKED, mode).loss_mask)


def test_an_unfinished_completion_keeps_all_its_tokens(renderer, tokenizer):
    ids = tokenizer("1+1", add_special_tokens=False)["input_ids"]
    assert renderer.completion_text(ids, True) == "<think>\n1+1"
    assert renderer.completion_text([], False) == ""


def test_control_tokens_inside_a_completion_stay_visible(renderer, tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<think>"), tokenizer.eos_token_id]
    assert renderer.completion_text(ids, False) == "[PAD]<think>"


def test_a_prompt_over_the_limit_is_named_with_its_length(tokenizer):
    renderer = Renderer(tokenizer, max_prompt_tokens=10, max_context_tokens=128)
    with pytest.raises(DataError, match=r"prompt p:1: must have at most 10 .* It has 15\. Raise model\.max_context"):
        renderer.prompt(PROMPT, True)


def test_a_demonstration_over_the_context_is_named_with_its_length(tokenizer):
    renderer = Renderer(tokenizer, max_prompt_tokens=20, max_context_tokens=30)
    with pytest.raises(DataError, match=r"prompt p:1 with its completion: must have at most 30 .* It has 36"):
        renderer.demonstration(WORKED, True)


def test_a_template_without_reasoning_ignores_the_mode():
    renderer = with_template(NO_REASONING)
    assert not renderer.supports_reasoning
    assert not renderer.prompt(PROMPT, True).reasoning_mode
    example = renderer.demonstration(WORKED, True)
    assert trained_text(byte_tokenizer(), example) == "85[|endofturn|]"
    assert renderer.completion_text(example.token_ids[example.loss_mask], False) == "85"


def test_a_template_that_always_opens_thinking_gets_whole_think_blocks():
    renderer = with_template(ALWAYS_OPENED)
    assert not renderer.supports_reasoning
    example = renderer.demonstration(WORKED, False)
    text = renderer.completion_text(example.token_ids[example.loss_mask], False)
    assert text == "<think>\n7+8=15,4+3+1=8\n</think>\n\n85"


def test_where_the_policy_opens_thinking_it_is_trained_to():
    renderer = with_template(OPENED_BY_THE_POLICY)
    assert renderer.supports_reasoning
    example = renderer.demonstration(WORKED, True)
    assert trained_text(byte_tokenizer(), example) == "<think>\n7+8=15,4+3+1=8\n</think>\n\n85[|endofturn|]"
    assert renderer.completion_text(example.token_ids[example.loss_mask], True).startswith("<think>\n7+8")


def test_without_a_template_contents_are_joined_by_line_breaks():
    renderer = with_template(None)
    messages = ({"role": "system", "content": "Add."}, {"role": "user", "content": "1+1=?"})
    rendered = renderer.prompt(Prompt("p:2", messages, "2", "math"), True)
    assert byte_tokenizer().decode(rendered.token_ids) == "Add.\n1+1=?\n"
    assert not renderer.supports_reasoning
    assert not rendered.reasoning_mode


def test_the_end_of_turn_is_the_token_the_template_writes():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "[EOS]"
    renderer = Renderer(tokenizer, max_prompt_tokens=64, max_context_tokens=128)
    end_of_turn = tokenizer.convert_tokens_to_ids("[|endofturn|]")
    assert renderer.stop_token_ids == (end_of_turn, tokenizer.eos_token_id)
    assert renderer.demonstration(BARE, False).token_ids[-1] == end_of_turn


def test_a_prompt_the_template_refuses_is_named(renderer):
    prompt = Prompt("p:3", ({"role": "critic", "content": "hm"},), "", "math")
    with pytest.raises(DataError, match=r"prompt p:3: must fit the model's chat template\. It says: role critic"):
        renderer.prompt(prompt, True)


def test_procedural_demonstrations_fit_the_default_budget(renderer):
    source = open_source(ProceduralSource(kind="procedural", trace_fraction=1.0))
    examples = [renderer.demonstration(source.demonstration(index), True) for index in range(300)]
    assert max(int(example.loss_mask.sum()) for example in examples) <= 40
