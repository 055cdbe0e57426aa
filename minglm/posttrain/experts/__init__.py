"""Expert iteration (report, section 3): experts by RL, one hybrid model from their answers, and RL on that."""
