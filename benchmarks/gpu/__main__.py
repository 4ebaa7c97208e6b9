"""What a GPU can show: the learner with the real EXAONE-4.0-1.2B architecture in bfloat16 and random weights.

    python -m benchmarks.gpu [PART ...] [--quick] [--output FILE.json]

    loss      log-probs, entropy and gradients: memory and seconds by tokens, beside all logits at once
    steps     long-tailed samples through the learner in several layouts, beside a bare PyTorch loop
    long      one sequence of up to 65,536 tokens a micro-batch
    weights   a pass over all weights as a device-to-device weight sync makes it, checksums included

Needs one GPU with 80 GB. Memory is the peak that torch allocated on the device.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu import learner
from benchmarks.parts import run_parts

PARTS = {
    "loss": learner.run_loss,
    "steps": learner.run_steps,
    "long": learner.run_long,
    "weights": learner.run_weights,
}

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: needs a GPU, and torch sees none.")
    run_parts("gpu", "The learner on a GPU, measured", __doc__, PARTS)
