"""The built-in reward `overlong`: DAPO's soft penalty for completions that come near the length limit."""

from __future__ import annotations

from rewards.registry import RewardInput, Score, reward


@reward("overlong", low=-1.0, high=0.0)
def overlong(sample: RewardInput, max_tokens: int, cache_tokens: int) -> Score:
    """0.0 up to `max_tokens - cache_tokens` completion tokens, then in a straight line to -1.0 at `max_tokens`.

    Formula 13 of DAPO (arXiv 2503.14476). Unlike there a truncated completion always gets -1.0, since the limit that
    cut it may be below `max_tokens`. ValueError unless 0 < cache_tokens <= max_tokens.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(
            f"cache_tokens = {cache_tokens}: must be above 0 and at most max_tokens = {max_tokens}. "
            "The penalty grows over the last cache_tokens. Correct rewards.components.overlong.params"
        )
    if sample.truncated:
        return Score(-1.0, "truncated at the token limit")
    excess = sample.completion_tokens - (max_tokens - cache_tokens)
    value = -min(1.0, max(0.0, excess / cache_tokens))
    return Score(value or 0.0, f"{sample.completion_tokens} tokens of {max_tokens}")
