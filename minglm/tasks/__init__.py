"""The task world: problem families with worked solutions, tools, and exact verifiers.

    from minglm.tasks import FAMILIES, GROUPS

`FAMILIES` maps the name of each family to its class; `GROUPS` each group to the names of its families. Both keep one
order, which seeds may rely on.
"""

import importlib

__all__ = ["FAMILIES", "GROUPS"]

_PACKAGES = {
    "reasoning": "minglm.tasks.reasoning",
    "code": "minglm.tasks.code",
    "agents": "minglm.tasks.agents",
    "general": "minglm.tasks.general",
}


def __getattr__(name: str):
    """Gather the families when they are first asked for: a group imports `minglm.tasks.task`, and so this file, first."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    families = {}
    groups = {}
    for group in _PACKAGES:
        classes = importlib.import_module(_PACKAGES[group]).FAMILIES
        groups[group] = tuple(family.family for family in classes)
        families |= {family.family: family for family in classes}
    assert len(families) == sum(map(len, groups.values())), "two families have one name"
    globals().update(FAMILIES=families, GROUPS=groups)
    return globals()[name]
