"""The judge's deterministic gates as a reward, so that the suite can attack them without a judge."""

from __future__ import annotations

from rewards.judge.gates import gate
from rewards.judge.settings import PromptSettings
from rewards.registry import RewardInput, Score, reward


@reward("attack_judge_gate")
def attack_judge_gate(sample: RewardInput) -> Score:
    """1.0 where the completion would be sent to the judge, 0.0 where a gate stops it."""
    candidate, reason = gate(sample, PromptSettings(), short=True)
    return Score(float(not reason), reason or candidate)
