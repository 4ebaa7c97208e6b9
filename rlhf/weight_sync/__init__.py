"""STEP -> NEXT ROLLOUT: the learner's weights reach every engine and are proven to have arrived."""
