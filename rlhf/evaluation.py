"""What an evaluation says: greedy accuracy and unbiased pass@k, each over the samples that really have a reward.

A sample without a value (abstained or failed) is left out of its prompt's `n` and counted. A prompt with fewer than `k`
valued samples is left out of pass@k and counted. Neither is ever treated as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.errors import RewardFailureError
from rlhf.samples import Abstained, RewardFailed, ScoredGroup


def pass_at_k(correct: ArrayLike, n: ArrayLike, k: int) -> NDArray[np.float64] | np.float64:
    """Unbiased probability that at least one of `k` samples is correct, from `correct` of `n` samples.

    `1 - C(n - c, k) / C(n, k)` (Chen et al. 2021, eq. 1) as a product of k factors, which cannot overflow. Broadcasts
    over `correct` and `n`; scalars give a float. ValueError unless `0 <= correct <= n` and `1 <= k <= n`.
    """
    correct, n = np.broadcast_arrays(np.asarray(correct, dtype=np.int64), np.asarray(n, dtype=np.int64))
    if k < 1 or bool(np.any(n < k)):
        raise ValueError(f"pass@{k} needs k >= 1 and at least k samples of every prompt, got n down to {n.min()}")
    if bool(np.any((correct < 0) | (correct > n))):
        raise ValueError("correct must lie between 0 and n")
    none_correct = np.ones(n.shape, dtype=np.float64)
    for drawn in range(k):
        none_correct = none_correct * (np.maximum(n - correct - drawn, 0) / (n - drawn))
    return 1.0 - none_correct[()]


def pass_at_k_stderr(correct: ArrayLike, n: ArrayLike, k: int) -> float:
    """Standard error of mean pass@k over prompts: the estimates' sample deviation (ddof 1) over sqrt(prompts).

    Prompts are the independent draws; the samples of one prompt are not. ValueError with fewer than two prompts.
    """
    estimates = np.atleast_1d(pass_at_k(correct, n, k))
    if estimates.size < 2:
        raise ValueError("a standard error over prompts needs at least two prompts")
    return float(estimates.std(ddof=1) / np.sqrt(estimates.size))


@dataclass(frozen=True)
class EvaluationResult:
    """Fractions are in [0, 1]. `pass_at_stderr` lacks a `k` that fewer than two prompts could be used for.

    Lengths, truncation and thinking are over all sampled completions, valued or not. `unscored` counts samples without
    a reward value, greedy ones included, by cause in `unscored_by_cause`. `prompts_without_greedy` and
    `prompts_short_of[k]` count the prompts that greedy accuracy and pass@k leave out.
    """

    greedy: float
    pass_at: dict[int, float]
    pass_at_stderr: dict[int, float]
    n_prompts: int
    samples_per_prompt: int
    completion_tokens_mean: float
    truncated_fraction: float
    thinks_fraction: float
    unscored: int
    unscored_by_cause: dict[str, int] = field(default_factory=dict)
    prompts_without_greedy: int = 0
    prompts_short_of: dict[int, int] = field(default_factory=dict)

    def as_summary(self) -> dict[str, float]:
        """Flat: `greedy`, `pass@<k>`, `pass@<k>_stderr`, lengths, counts; `pass@<k>_left_out` only where not zero."""
        summary: dict[str, float] = {"greedy": self.greedy}
        for k, value in self.pass_at.items():
            summary[f"pass@{k}"] = value
            if k in self.pass_at_stderr:
                summary[f"pass@{k}_stderr"] = self.pass_at_stderr[k]
            if self.prompts_short_of.get(k):
                summary[f"pass@{k}_left_out"] = self.prompts_short_of[k]
        if self.prompts_without_greedy:
            summary["greedy_left_out"] = self.prompts_without_greedy
        names = ("n_prompts", "samples_per_prompt", "completion_tokens_mean", "truncated_fraction", "thinks_fraction")
        summary.update({name: getattr(self, name) for name in (*names, "unscored")})
        summary.update({f"unscored/{cause}": count for cause, count in self.unscored_by_cause.items()})
        return summary


def summarise(
    greedy: Sequence[ScoredGroup], sampled: Sequence[ScoredGroup], correct_at: float, pass_at: Sequence[int]
) -> EvaluationResult:
    """Statistics of one evaluation: `greedy` has one sample a prompt, `sampled` several of the same prompts.

    A sample is correct when its task value is at least `correct_at`. Raises RewardFailureError where no prompt is left
    to take a figure from, ValueError without any group.
    """
    if not greedy or not sampled:
        raise ValueError("an evaluation needs at least one greedy and one sampled group")
    greedy_correct, greedy_n = _tally(greedy, correct_at)
    correct, n = _tally(sampled, correct_at)
    usable = {k: n >= k for k in pass_at}
    causes = _causes([*greedy, *sampled])
    _require_values(greedy_n, usable, causes, next((g.failure_report for g in (*greedy, *sampled) if g.failed), ""))
    samples = [sample for scored in sampled for sample in scored.group.samples]
    has_greedy = greedy_n > 0
    return EvaluationResult(
        greedy=float(np.mean(greedy_correct[has_greedy] / greedy_n[has_greedy])),
        pass_at={k: float(np.mean(pass_at_k(correct[use], n[use], k))) for k, use in usable.items()},
        pass_at_stderr={
            k: pass_at_k_stderr(correct[use], n[use], k) for k, use in usable.items() if np.count_nonzero(use) > 1
        },
        n_prompts=len(sampled),
        samples_per_prompt=max(len(scored.group.samples) for scored in sampled),
        completion_tokens_mean=float(np.mean([sample.completion_tokens for sample in samples])),
        truncated_fraction=float(np.mean([sample.truncated for sample in samples])),
        thinks_fraction=float(np.mean([sample.thinks for sample in samples])),
        unscored=sum(causes.values()),
        unscored_by_cause=causes,
        prompts_without_greedy=int(np.count_nonzero(~has_greedy)),
        prompts_short_of={k: int(np.count_nonzero(~use)) for k, use in usable.items()},
    )


def _tally(groups: Sequence[ScoredGroup], correct_at: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(correct, valued) samples of each group, int64 [P]."""
    correct = [sum(reward.task >= correct_at for _, reward in scored.valued) for scored in groups]
    return np.array(correct, dtype=np.int64), np.array([len(scored.valued) for scored in groups], dtype=np.int64)


def _causes(groups: Sequence[ScoredGroup]) -> dict[str, int]:
    outcomes = [outcome for scored in groups for outcome in scored.outcomes]
    counts = {
        "abstained": sum(isinstance(outcome, Abstained) for outcome in outcomes),
        "failed": sum(isinstance(outcome, RewardFailed) for outcome in outcomes),
    }
    return {cause: count for cause, count in counts.items() if count}


def _require_values(
    greedy_n: NDArray[np.int64], usable: Mapping[int, NDArray[np.bool_]], causes: Mapping[str, int], failure: str
) -> None:
    empty = [] if greedy_n.any() else ["greedy accuracy"]
    empty += [f"pass@{k}" for k, use in usable.items() if not use.any()]
    if not empty:
        return
    why = ", ".join(f"{count} {cause}" for cause, count in causes.items()) or "too few samples a prompt"
    raise RewardFailureError(
        f"evaluation: no prompt has enough rewarded samples for {', '.join(empty)} ({why}). A figure over nothing "
        "would read as a result. See which reward component abstains or fails, or lower evaluation.pass_at."
        + (f"\nFirst failure: {failure}" if failure else "")
    )
