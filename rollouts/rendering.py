"""Prompt -> token ids, completion ids -> text: the only place that knows how the chat template marks thinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jinja2.exceptions import TemplateError

from rlhf.errors import ConfigError, DataError
from rlhf.samples import Demonstration, Prompt, RenderedPrompt, TokenizedExample
from rlhf.thinking import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = ({"role": "user", "content": "probe"},)


class Renderer:
    """Renders for one tokenizer, within two limits in tokens.

    `supports_reasoning`: the chat template reacts to `enable_thinking`. Where it does not, `reasoning_mode` has no
    effect and rendered prompts say so. A tokenizer without a chat template renders contents joined by line breaks.
    `stop_token_ids`: a completion ends with one of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self.max_context_tokens = max_context_tokens
        self._has_template = bool(tokenizer.chat_template)
        self.supports_reasoning = self._text(_PROBE, True) != self._text(_PROBE, False)
        self._opening = {mode: _opened_thinking(self._text(_PROBE, mode)) for mode in (False, True)}
        self._end_of_turn_id = self._find_end_of_turn()
        eos = tokenizer.eos_token_id
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys((self._end_of_turn_id, eos)))

    def prompt(self, prompt: Prompt, reasoning_mode: bool) -> RenderedPrompt:
        """The tokens the policy continues. Raises DataError for a prompt too long or against the template."""
        reasoning_mode = reasoning_mode and self.supports_reasoning
        token_ids = self._prompt_ids(prompt, reasoning_mode)
        if len(token_ids) > self._max_prompt_tokens:
            limit = f"{self._max_prompt_tokens} (model.max_context_tokens - rollouts.max_completion_tokens)"
            fix = "Raise model.max_context_tokens, lower rollouts.max_completion_tokens or remove the prompt."
            raise DataError(
                f"prompt {prompt.prompt_id}: must have at most {limit} tokens. It has {len(token_ids)}. {fix}"
            )
        return RenderedPrompt(prompt, np.array(token_ids, dtype=np.int32), reasoning_mode)

    def demonstration(self, demonstration: Demonstration, reasoning_mode: bool) -> TokenizedExample:
        """The prompt and the worked answer, as `prompt` and `completion` render them; raises what those raise."""
        rendered = self.prompt(demonstration.prompt, reasoning_mode)
        return self.completion(rendered, demonstration.reasoning, demonstration.content)

    def completion(self, rendered: RenderedPrompt, reasoning: str, content: str) -> TokenizedExample:
        """Prompt tokens, then what the policy should have sampled: the end-of-turn token is the last to be trained.

        In reasoning mode that is the reasoning, the closing tag and the content; else the content alone. Raises
        DataError where it does not fit the context.
        """
        completion = self._encode(self._completion_text(reasoning, content, rendered.reasoning_mode))
        token_ids = np.array([*rendered.token_ids, *completion, self._end_of_turn_id], dtype=np.int32)
        if len(token_ids) > self.max_context_tokens:
            limit = f"{self.max_context_tokens} (model.max_context_tokens)"
            fix = "Raise model.max_context_tokens or remove the record."
            name = f"prompt {rendered.prompt.prompt_id} with its completion"
            raise DataError(f"{name}: must have at most {limit} tokens. It has {len(token_ids)}. {fix}")
        return TokenizedExample(token_ids, np.arange(len(token_ids)) >= len(rendered.token_ids))

    def completion_text(self, token_ids: Sequence[int] | np.ndarray, reasoning_mode: bool) -> str:
        """What the completion says, the stop token left out and a `<think>` that the template opened put in front."""
        ids = [int(token) for token in token_ids]
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self._opening[reasoning_mode] + text

    def _completion_text(self, reasoning: str, content: str, reasoning_mode: bool) -> str:
        opening = self._opening[reasoning_mode]
        if not opening and not reasoning_mode:
            return content
        thoughts = reasoning + "\n" if reasoning else ""
        unopened = "" if opening else THINK_OPEN + "\n"
        return f"{unopened}{thoughts}{THINK_CLOSE}\n\n{content}"

    def _prompt_ids(self, prompt: Prompt, reasoning_mode: bool) -> list[int]:
        try:
            text = self._text(prompt.messages, reasoning_mode)
        except TemplateError as error:
            fix = "Correct the prompt's roles or use another model."
            message = f"prompt {prompt.prompt_id}: must fit the model's chat template. It says: {error}. {fix}"
            raise DataError(message) from error
        return self._encode(text) if self._has_template else self._encode_plain(text)

    def _text(self, messages: Sequence[Mapping[str, str]], reasoning_mode: bool, *, generate: bool = True) -> str:
        if not self._has_template:
            return "".join(message["content"] + "\n" for message in messages)
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generate,
            enable_thinking=reasoning_mode,
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_plain(self, text: str) -> list[int]:
        """Without a template to write it, the beginning-of-text token comes from the tokenizer, but no end of text."""
        ids = list(self._tokenizer(text, add_special_tokens=True)["input_ids"])
        return ids[:-1] if ids[-1] == self._tokenizer.eos_token_id else ids

    def _find_end_of_turn(self) -> int:
        """The control token the template writes after an assistant's content, else the tokenizer's end of sequence."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            fix = "Set eos_token in its tokenizer_config.json."
            raise ConfigError([f"model: its tokenizer must have an end-of-sequence token. It has none. {fix}"])
        if not self._has_template:
            return eos
        conversation = (*_PROBE, {"role": "assistant", "content": "probed"})
        after = self._encode(self._text(conversation, False, generate=False).rpartition("probed")[2])
        control = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        return after[0] if after and after[0] in control else eos


def _opened_thinking(generation_prompt: str) -> str:
    """The `<think>` that ends the prompt, with the white space after it; empty if the template opens none."""
    _, tag, after = generation_prompt.rpartition(THINK_OPEN)
    return tag + after if tag and not after.strip() else ""
