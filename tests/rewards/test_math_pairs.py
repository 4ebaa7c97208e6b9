"""The labelled LaTeX pairs of the accuracy benchmark: the reward errs on those written down here and on no other."""

from __future__ import annotations

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from benchmarks.math_accuracy import latex_pairs, ours
from rewards.registry import Score

# (reference, completion) -> what the reward wrongly says. The list may get shorter, never longer.
KNOWN_ERRORS = {
    (r"\sin 30^\circ", r"\boxed{\frac12}"): 0.0,  # math-verify takes degrees for radians
    ("18", r"\boxed{\text{The answer is } 18}"): 0.0,  # a sentence in a box
    (r"\text{(C)}", r"\boxed{C. 15}"): 0.0,  # a choice with its content
    (r"x < -1 \text{ or } x > 1", r"\boxed{(-\infty,-1)\cup(1,\infty)}"): 0.0,
    (
        r"\begin{pmatrix} 16/49 \\ 48/49 \\ 24/49 \end{pmatrix}",
        r"\boxed{\frac{1}{49}\begin{pmatrix} 16 \\ 48 \\ 24 \end{pmatrix}}",
    ): 0.0,
}


def test_the_reward_errs_on_no_other_pair_than_the_known_ones() -> None:
    pairs = latex_pairs()
    middle = len(pairs) // 2
    with ThreadPoolExecutor(2) as threads:  # each half in a process of its own
        verdicts = [*itertools.chain(*threads.map(ours, (pairs[:middle], pairs[middle:])))]
    wrong = {
        (pair.gold, pair.answer): verdict.value if isinstance(verdict, Score) else verdict
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if not isinstance(verdict, Score) or verdict.value != float(pair.correct)
    }
    assert wrong == KNOWN_ERRORS


def test_the_pairs_are_many_distinct_and_balanced() -> None:
    pairs = latex_pairs()
    assert len(pairs) == len({(pair.gold, pair.answer) for pair in pairs}) >= 600
    assert 0.4 < sum(pair.correct for pair in pairs) / len(pairs) < 0.6
    assert min(Counter(pair.topic for pair in pairs).values()) >= 8
