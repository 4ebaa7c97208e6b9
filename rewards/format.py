"""The built-in reward `format`: does the completion have the shape a reader can use?"""

from __future__ import annotations

import re

from rewards.registry import THINK_CLOSE, THINK_OPEN, RewardInput, Score, reward

SPECIAL_MARKUP = re.compile(
    r"</?think>|</?tool_call>|<\|[^|<>\n]{1,40}\|>|\[\|[^|\[\]\n]{1,40}\|\]"
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)
EMPTY_THINKING = re.compile(r"\A\s*<think>\s*</think>")


@reward("format")
def format_reward(sample: RewardInput) -> Score:
    """1.0 for a complete, clean answer, else 0.0 with the first rule it breaks as the reason.

    The rules: not truncated; in reasoning mode exactly one `</think>` closes the thinking, otherwise there is no
    thinking (an empty block is the template's own); the final answer is not empty; it has no chat-template markup.
    """
    problem = _truncation(sample) or _thinking(sample) or _final(sample.final)
    return Score(0.0, problem) if problem else Score(1.0, "well formed")


def _truncation(sample: RewardInput) -> str:
    return "truncated at the token limit" if sample.truncated else ""


def _thinking(sample: RewardInput) -> str:
    if not sample.reasoning_mode:
        return "thinking outside reasoning mode" if THINK_CLOSE in _without_empty_block(sample.completion) else ""
    closed, opened = sample.completion.count(THINK_CLOSE), sample.completion.count(THINK_OPEN)
    if closed != 1:
        return f"{closed} {THINK_CLOSE} in reasoning mode, expected exactly 1"
    return f"{opened} {THINK_OPEN} in reasoning mode, expected at most 1" if opened > 1 else ""


def _without_empty_block(completion: str) -> str:
    return EMPTY_THINKING.sub("", completion)


def _final(final: str) -> str:
    if not final.strip():
        return "no final answer"
    markup = SPECIAL_MARKUP.search(final)
    return f"chat-template markup {markup.group()!r} in the final answer" if markup else ""
