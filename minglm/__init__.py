"""minglm: a compact, exact re-implementation of GLM-4.5, from the architecture to its training."""
