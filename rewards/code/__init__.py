"""Code execution rewards: sandbox tiers, tests as questions, and the reward `code`."""

from rewards.code.grade import CodeResult, Options, Outcome, grade
from rewards.code.launch import Limits, Tier
from rewards.code.reward import code
from rewards.code.suites import parse
from rewards.code.tiers import self_test

__all__ = ["CodeResult", "Limits", "Options", "Outcome", "Tier", "code", "grade", "parse", "self_test"]
