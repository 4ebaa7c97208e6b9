"""Learning curves of both programs as a picture: `picture.py '{case: {program: [reward, ...]}}' FILE.png`."""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHED_STEPS = 5


def smoothed(values: list[float]) -> list[float]:
    parts = [values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


curves = json.loads(sys.argv[1])
figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
for axis, (case, programs) in zip(axes[0], curves.items(), strict=True):
    for program, rewards in programs.items():
        axis.plot(range(1, len(rewards) + 1), smoothed(rewards), label=program)
    axis.set(title=case, xlabel="step", ylabel=f"mean reward, average of {SMOOTHED_STEPS} steps", ylim=(0, 1))
    axis.legend()
figure.tight_layout()
figure.savefig(sys.argv[2], dpi=100)
