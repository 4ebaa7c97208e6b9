"""The shape of a completion: thinking closed once, an answer, no template markup, not truncated."""

from __future__ import annotations

import pytest

from rewards.format import format_reward
from rewards.registry import RewardInput


@pytest.mark.parametrize(
    ("completion", "reasoning_mode"),
    [
        ("<think>\n5 + 7\n</think>\n\n12", True),
        ("5 + 7</think>12", True),
        ("12", False),
        ("<think>\n\n</think>\n\n12", False),
        ("a < b, [1, 2], |x| and <b>bold</b>", False),
    ],
)
def test_well_formed_completions_get_one(completion: str, reasoning_mode: bool) -> None:
    assert format_reward(RewardInput.of(completion, reasoning_mode=reasoning_mode)).value == 1.0


@pytest.mark.parametrize(
    ("completion", "reasoning_mode", "reason"),
    [
        ("<think>never closed 12", True, "0 </think>"),
        ("12", True, "0 </think>"),
        ("<think>a</think>b</think>12", True, "2 </think>"),
        ("<think>a<think>b</think>12", True, "2 <think>"),
        ("<think>a</think>  ", True, "no final answer"),
        ("", False, "no final answer"),
        ("<think>thought</think>12", False, "thinking outside reasoning mode"),
        ("<think>a</think>12[|endofturn|]", True, "markup '[|endofturn|]'"),
        ("<think>a</think>12<|im_end|>", True, "markup '<|im_end|>'"),
        ("12</s>", False, "markup '</s>'"),
        ("12 <tool_call>", False, "markup"),
        ("12\n<start_of_turn>user", False, "markup"),
    ],
)
def test_malformed_completions_get_zero_with_the_reason(completion: str, reasoning_mode: bool, reason: str) -> None:
    score = format_reward(RewardInput.of(completion, reasoning_mode=reasoning_mode))
    assert score.value == 0.0
    assert reason in score.reason


def test_a_truncated_completion_gets_zero() -> None:
    assert format_reward(RewardInput.of("12", truncated=True)).value == 0.0
