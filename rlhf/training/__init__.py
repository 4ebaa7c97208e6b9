"""LOSS -> OPTIMISER STEP: DeepSpeed engine, learner and its Ray shell."""
