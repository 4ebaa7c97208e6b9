"""Runs that are killed and resumed, and what it costs to be able to.

    python -m benchmarks.survival [PART ...] [--quick] [--output FILE.json]

    resumes       SFT + RL + DPO on the real stack; the whole process tree is killed (-9) at random moments, and resumed
    cost          time of RL steps with journal, digests and a checkpoint every ten steps over those without

`resumes_exact` counts the resumes after which every step that was trained again had the recorded bits: the digests of
all float32 masters in RL, loss and gradient norm in SFT and DPO.
"""

from __future__ import annotations

from benchmarks.parts import run_parts
from benchmarks.survival import cost, resumes

if __name__ == "__main__":
    run_parts("survival", "Survival, measured", __doc__, {"resumes": resumes.run, "cost": cost.run})
