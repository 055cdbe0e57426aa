"""Judging models on held-out text and problems; every number comes with its 95% interval."""
