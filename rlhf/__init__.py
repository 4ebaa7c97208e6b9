"""Post-training core: typed records, formulas, learner, weight sync and the controller loop."""
