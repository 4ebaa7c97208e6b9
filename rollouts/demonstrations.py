"""Demonstrations as an endless stream of tokenised examples, in reasoning and non-reasoning mode."""

from __future__ import annotations

import random
from collections.abc import Iterator

from rlhf.samples import TokenizedExample
from rollouts.prompts import PromptStream
from rollouts.rendering import Renderer


def demonstrations(
    stream: PromptStream, renderer: Renderer, seed: int, *, reasoning_fraction: float
) -> Iterator[TokenizedExample]:
    """A share `reasoning_fraction` of the examples is in reasoning mode, where the model has one."""
    choose = random.Random(seed)
    while True:
        reasoning_mode = renderer.supports_reasoning and choose.random() < reasoning_fraction
        yield renderer.demonstration(stream.next_demonstration(), reasoning_mode)


def balanced_demonstrations(
    stream: PromptStream, renderer: Renderer, *, window: int, token_ratio: float
) -> Iterator[TokenizedExample]:
    """In every `window` of examples the trained tokens of reasoning and non-reasoning mode are as `token_ratio` : 1.

    They cannot be so exactly, because an example is taken whole: each mode is at most one example off its share. EXAONE
    4.0 uses 1.5, counted in tokens, because with more reasoning the model reasons when asked not to.
    """
    while True:
        tokens = {True: 0, False: 0}
        for _ in range(window):
            reasoning_mode = tokens[True] <= token_ratio * tokens[False]
            example = renderer.demonstration(stream.next_demonstration(), reasoning_mode)
            tokens[reasoning_mode] += int(example.loss_mask.sum())
            yield example
