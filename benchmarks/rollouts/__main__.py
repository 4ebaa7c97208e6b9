"""Cost of rollouts, weight sync and the driver.

    python -m benchmarks.rollouts [PART ...] [--quick] [--baseline GIT_REF] [--output FILE.json]

    overlap       the loop beside its slower half, and refilling filtered groups, at staleness 1 and 0
    vs_trl        speed, memory and learning beside the newest TRL
    weight_sync   seconds and pause of a sync by model size, engines and ZeRO stage, beside vLLM's bare reload
    driver        bytes through the driver by completion length, its time per group by engines
    learning      gains at staleness 0, 1 and 4; with two engines, tensor parallel 2, a kept cache, masked tokens

All parts run unless some are named; figures of parts that did not run are kept from the last results.
"""

from __future__ import annotations

from benchmarks.parts import run_parts
from benchmarks.rollouts import driver, learning, overlap, vs_trl, weight_sync

PARTS = {
    "overlap": overlap.run,
    "vs_trl": vs_trl.run,
    "weight_sync": weight_sync.run,
    "driver": driver.run,
    "learning": learning.run,
}

if __name__ == "__main__":
    run_parts("rollouts", "Rollouts, measured", __doc__, PARTS)
