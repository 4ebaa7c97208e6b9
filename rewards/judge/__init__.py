"""A language model as the judge, behind any OpenAI-compatible endpoint.

    gates (no call) -> prompt, what others wrote fenced in -> cache -> endpoint -> strict reading -> value
                                                              canaries beside

A failed gate is a 0. Whatever else goes wrong, an unreadable reply included, is an error and never a 0.
"""

from rewards.judge.canaries import JudgeUnreliableError
from rewards.judge.forms import JudgeReplyError
from rewards.judge.reward import counts, judge, judge_pairwise, verdict

__all__ = [
    "JudgeReplyError",
    "JudgeUnreliableError",
    "counts",
    "judge",
    "judge_pairwise",
    "verdict",
]
