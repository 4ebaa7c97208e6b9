"""Which prompts are worth training on, judged by how many of their sampled completions are correct. Pure functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf.config import FilterStage, RunConfig
from rlhf.errors import DataError
from rlhf.samples import ScoredGroup

Verdict = Literal["kept", "too_easy", "too_hard", "unscored"]

_BAR_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class FilterReport:
    """The correct completions of every prompt and what follows from them.

    `correct[i]`: of the i-th prompt's `samples` completions, or None where fewer than half have a reward: such a prompt
    stays and is counted. A prompt is too easy with at least `drop_at_least` correct, too hard with at most
    `drop_at_most` (None: no prompt is too hard). Raises ValueError where a count is impossible.
    """

    correct: tuple[int | None, ...]
    samples: int
    drop_at_least: int
    drop_at_most: int | None = None

    def __post_init__(self) -> None:
        if any(count is not None and not 0 <= count <= self.samples for count in self.correct):
            raise ValueError(f"correct counts must lie between 0 and {self.samples}")

    @classmethod
    def of(cls, groups: Iterable[ScoredGroup], stage: FilterStage, correct_at: float) -> FilterReport:
        """The report over `groups` in their order; correct is a task value of at least `correct_at`."""
        return cls.judged((correct_samples(scored, correct_at) for scored in groups), stage)

    @classmethod
    def judged(cls, correct: Iterable[int | None], stage: FilterStage) -> FilterReport:
        """The thresholds of `stage` applied to counts that are there already."""
        samples = stage.samples_per_prompt
        return cls(tuple(correct), samples, stage.drop_at_least or samples, stage.drop_at_most)

    def verdict(self, count: int | None) -> Verdict:
        """What becomes of a prompt with `count` correct completions."""
        if count is None:
            return "unscored"
        if count >= self.drop_at_least:
            return "too_easy"
        return "too_hard" if self.drop_at_most is not None and count <= self.drop_at_most else "kept"

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the prompts that stay, unscored ones among them."""
        return tuple(i for i, n in enumerate(self.correct) if self.verdict(n) in ("kept", "unscored"))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of all other prompts."""
        return tuple(i for i, n in enumerate(self.correct) if self.verdict(n) in ("too_easy", "too_hard"))

    @property
    def counts(self) -> dict[Verdict, int]:
        """Prompts by verdict; they add up to all prompts."""
        verdicts = [self.verdict(count) for count in self.correct]
        return {verdict: verdicts.count(verdict) for verdict in ("kept", "too_easy", "too_hard", "unscored")}

    @property
    def histogram(self) -> tuple[int, ...]:
        """Prompts by number correct, from 0 to `samples`; unscored prompts are in none of them."""
        return tuple(self.correct.count(number) for number in range(self.samples + 1))

    def describe(self) -> list[str]:
        """Lines for the console: one for each number correct with its bar, then the totals."""
        most = max(self.histogram) or 1
        width = len(str(most))
        lines = [f"correct of {self.samples}, prompts:"]
        for number, prompts in enumerate(self.histogram):
            bar = "#" * -(-prompts * _BAR_CHARACTERS // most)
            verdict = self.verdict(number)
            note = "" if verdict == "kept" else f"dropped, {verdict.replace('_', ' ')}"
            lines.append(f"  {number:>2} {prompts:>{width}} {bar:<{_BAR_CHARACTERS}} {note}".rstrip())
        counts = self.counts
        unscored = f", {counts['unscored']} unscored among them" if counts["unscored"] else ""
        dropped = f"dropped {counts['too_easy']} too easy and {counts['too_hard']} too hard"
        return [*lines, f"kept {len(self.kept)} of {len(self.correct)} prompts{unscored}; {dropped}"]

    def to_json(self) -> str:
        """The counts, without the thresholds: other thresholds need no new samples."""
        return json.dumps({"samples": self.samples, "correct": self.correct})

    @classmethod
    def from_json(cls, text: str, stage: FilterStage) -> FilterReport:
        """The counts of `to_json` under the thresholds of `stage`. Raises DataError for anything else."""
        fix = "Remove the file, and the prompts are sampled again."
        try:
            stored = json.loads(text)
            samples, correct = stored["samples"], stored["correct"]
            if not isinstance(correct, list) or not all(n is None or type(n) is int for n in correct):
                raise ValueError("correct is not a list of counts")
            if samples != stage.samples_per_prompt:
                raise ValueError(f"it has {samples} samples a prompt, the stage {stage.samples_per_prompt}")
            return cls.judged(correct, stage)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"filter cache: must hold the counts of this stage. It does not: {error}. {fix}") from error


def correct_samples(scored: ScoredGroup, correct_at: float) -> int | None:
    """Correct completions of a group; None where fewer than half have a reward.

    Where some have none, the share among the others is scaled to all and rounded: only a prompt whose every judged
    completion is correct (or wrong) counts as all correct (or all wrong).
    """
    values = [value for _, value in scored.valued]
    samples = len(scored.outcomes)
    if not values or 2 * len(values) < samples:
        return None
    correct = sum(value.task >= correct_at for value in values)
    return round(correct * samples / len(values))


def cache_key(model_digest: str, data_fingerprint: str, config: RunConfig, stage: FilterStage, *extra: str) -> str:
    """A name for the counts: the same for the same weights, prompts, sampling settings and rewards.

    Thresholds are left out, see `to_json`. `extra` is whatever else the caller lets decide, such as the reasoning mode.
    """
    rollouts = config.rollouts
    material = {
        "model": model_digest,
        "data": data_fingerprint,
        "seed": config.seed,
        "prompts": stage.prompts,
        "samples": stage.samples_per_prompt,
        "sampling": [stage.temperature, rollouts.top_p, rollouts.top_k, rollouts.max_completion_tokens],
        "context": config.model.max_context_tokens,
        "rewards": {name: part.model_dump(mode="json") for name, part in config.rewards.components.items()},
        "modules": config.rewards.modules,
        "correct_at": config.rewards.correct_at,
        "extra": extra,
    }
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:24]
