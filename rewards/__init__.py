"""Reward services: SAMPLE -> REWARD. A reward of your own is one function decorated with `@reward`."""

from rewards.registry import Abstain, RewardInput, Score, TransientRewardError, reward

__all__ = ["Abstain", "RewardInput", "Score", "TransientRewardError", "reward"]
