"""minglm: a compact, exact re-implementation of GLM-4.5, from the architecture to its training."""

import importlib

__all__ = ["GLM", "GLMConfig", "Tokenizer"]

_HOMES = {"GLM": "minglm.model", "GLMConfig": "minglm.config", "Tokenizer": "minglm.tokenizer"}


def __getattr__(name: str):
    """Import the public classes when they are first used: `python -m minglm --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
