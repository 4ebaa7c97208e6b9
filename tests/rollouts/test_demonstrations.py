"""How much of supervised learning is in reasoning mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import ProceduralSource
from rlhf.models import byte_tokenizer
from rlhf.samples import Demonstration, TokenizedExample
from rollouts.demonstrations import balanced_demonstrations, demonstrations
from rollouts.prompts import PromptStream, open_source
from rollouts.rendering import Renderer


@dataclass
class Recording:
    """A renderer that notes the mode of every example."""

    renderer: Renderer
    supports_reasoning: bool = True
    modes: list[bool] = field(default_factory=list)

    def demonstration(self, demonstration: Demonstration, reasoning_mode: bool) -> TokenizedExample:
        self.modes.append(reasoning_mode)
        return self.renderer.demonstration(demonstration, reasoning_mode)


def recording(**settings: bool) -> Recording:
    return Recording(Renderer(byte_tokenizer(), max_prompt_tokens=64, max_context_tokens=256), **settings)


def stream(seed: int = 0) -> PromptStream:
    return PromptStream(open_source(ProceduralSource(kind="procedural", difficulty=3, trace_fraction=0.7)), seed)


def trained(examples: Iterator[TokenizedExample], count: int) -> list[int]:
    return [int(example.loss_mask.sum()) for example in islice(examples, count)]


@given(seed=st.integers(0, 2**16), window=st.integers(2, 40), ratio=st.floats(0.2, 5.0))
def test_in_every_window_each_mode_is_within_one_example_of_its_share_of_trained_tokens(
    seed: int, window: int, ratio: float
) -> None:
    renderer, windows = recording(), 3
    lengths = trained(
        balanced_demonstrations(stream(seed), renderer, window=window, token_ratio=ratio), window * windows
    )
    for start in range(0, window * windows, window):
        chosen = list(zip(renderer.modes[start:], lengths[start : start + window], strict=False))
        thinking, direct = ([n for mode, n in chosen if mode is wanted] for wanted in (True, False))
        assert sum(thinking) <= ratio * sum(direct) + max(thinking)
        assert ratio * sum(direct) <= sum(thinking) + ratio * max(direct, default=0)


def test_1_5_to_1_is_counted_in_tokens_not_in_examples() -> None:
    renderer = recording()
    lengths = trained(balanced_demonstrations(stream(), renderer, window=1000, token_ratio=1.5), 1000)
    thinking = sum(n for mode, n in zip(renderer.modes, lengths, strict=True) if mode)
    assert thinking / (sum(lengths) - thinking) == pytest.approx(1.5, abs=0.02)
    assert sum(renderer.modes) < 500, "reasoning is longer, so it is fewer of the examples"


def test_every_window_starts_anew() -> None:
    renderer = recording()
    trained(balanced_demonstrations(stream(), renderer, window=2, token_ratio=1.0), 20)
    assert renderer.modes == [True, False] * 10


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_fraction_of_the_examples_is_in_reasoning_mode(fraction: float) -> None:
    renderer = recording()
    trained(demonstrations(stream(), renderer, 3, reasoning_fraction=fraction), 800)
    assert sum(renderer.modes) / 800 == pytest.approx(fraction, abs=0.05 if 0 < fraction < 1 else 0)


def test_without_reasoning_in_the_template_every_example_is_direct() -> None:
    renderer = recording(supports_reasoning=False)
    trained(demonstrations(stream(), renderer, 3, reasoning_fraction=1.0), 10)
    assert renderer.modes == [False] * 10


def test_the_seed_decides_the_modes() -> None:
    first, again, other = recording(), recording(), recording()
    for renderer, seed in ((first, 3), (again, 3), (other, 4)):
        trained(demonstrations(stream(), renderer, seed, reasoning_fraction=0.5), 50)
    assert first.modes == again.modes
    assert first.modes != other.modes
