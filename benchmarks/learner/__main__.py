"""What does the learner cost in memory and time?

    python -m benchmarks.learner [PART ...] [--quick] [--baseline GIT_REF] [--output FILE.json]

    logprob_memory   peak memory of log-probs and their backward pass by vocabulary and tokens
    packing          padding, balance over ranks, time per trained token on long-tailed lengths
    learner          trained tokens per second beside a bare PyTorch loop and an older checkout
    zero3_load       peak memory of a rank after loading and one step, by model size and ranks
    full_size        the EXAONE-4.0-1.2B architecture, one sequence of 8,192 tokens

All parts run unless some are named; figures of parts that did not run are kept from the last results. `--baseline`
checks GIT_REF out beside this tree and times it on the same work.
"""

from __future__ import annotations

from benchmarks.learner import full_size, logprob_memory, packing, speed, zero3_load
from benchmarks.parts import run_parts

PARTS = {
    "logprob_memory": logprob_memory.run,
    "packing": packing.run,
    "learner": speed.run,
    "zero3_load": zero3_load.run,
    "full_size": full_size.run,
}

if __name__ == "__main__":
    run_parts("learner", "The learner, measured", __doc__, PARTS)
