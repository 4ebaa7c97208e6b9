"""The built-in reward `conciseness`: is the completion as short as asked for?"""

from __future__ import annotations

from rewards.registry import RewardInput, Score, reward


@reward("conciseness")
def conciseness(sample: RewardInput, target_tokens: int, max_tokens: int) -> Score:
    """1.0 up to `target_tokens` completion tokens, then falling in a straight line to 0.0 at `max_tokens`.

    A truncated completion gets 0.0, however short: it has no end. ValueError unless 0 <= target_tokens < max_tokens.
    """
    if not 0 <= target_tokens < max_tokens:
        raise ValueError(
            f"target_tokens = {target_tokens}: must be at least 0 and below max_tokens = {max_tokens}. "
            "The reward falls from 1 to 0 between the two. Correct rewards.components.conciseness.params"
        )
    if sample.truncated:
        return Score(0.0, "truncated at the token limit")
    tokens = sample.completion_tokens
    value = (max_tokens - tokens) / (max_tokens - target_tokens)
    return Score(min(1.0, max(0.0, value)), f"{tokens} tokens, {target_tokens} wanted")
