"""The same small functions written as a loop, and the slips that loops invite."""

import random
from collections.abc import Sequence
from typing import Any

from minglm.tasks.code.steps import KINDS, Step, Steps, apply
from minglm.tasks.code.steps import mistakes as step_mistakes

FILTERS = ("even", "odd", "above", "below")
CHANGES = ("add", "subtract", "times", "square", "double", "negate")
RESULTS = ("sum", "count")

SLIPS = {
    "early": "return stands inside the loop",
    "replaced": "each round replaces what was gathered",
    "start": "it does not start with nothing",
}


def draw(rng: random.Random, count: int, inputs: Sequence[Sequence[int]]) -> Steps:
    """Two or three steps that one loop can do: a filter, a change, a sum or count, of which two leave one out."""
    while True:
        steps = [Step(kind, rng.choice(KINDS[kind].numbers)) for kind in map(rng.choice, (FILTERS, CHANGES, RESULTS))]
        if count == 2:
            del steps[rng.randrange(3)]
        values = [apply(tuple(steps), xs) for xs in inputs]
        shorter = [steps[:place] + steps[place + 1 :] for place in range(count)]
        if len(set(map(repr, values))) < 3 or any([apply(tuple(less), xs) for xs in inputs] == values for less in shorter):
            continue
        if mistakes(tuple(steps), inputs):
            return tuple(steps)


def mistakes(steps: Steps, inputs: Sequence[Sequence[int]]) -> list[Steps]:
    """As those of the steps, as far as a loop can do them."""
    kinds = {*FILTERS, *CHANGES, *RESULTS}
    return [wrong for wrong in step_mistakes(steps, inputs) if {step.kind for step in wrong} <= kinds]


def render(name: str, steps: Steps, slip: str | None = None) -> str:
    """The function as a loop, right or with a slip."""
    condition, change, result = _parts(steps)
    start, gather = {
        "sum": ("0", f"total += {change}"),
        "count": ("0", "total += 1"),
        None: ("[]", f"total.append({change})"),
    }[result]
    if slip == "start":
        start = "[0]" if result is None else "1"
    if slip == "replaced":
        gather = {"sum": f"total = {change}", "count": "total = 1", None: f"total = [{change}]"}[result]
    lines = [f"def {name}(xs):", f"    total = {start}", "    for x in xs:"]
    lines += [f"        if {condition}:", f"            {gather}"] if condition else [f"        {gather}"]
    return "\n".join([*lines, "        return total" if slip == "early" else "    return total"])


def _parts(steps: Steps) -> tuple[str | None, str, str | None]:
    """Condition, change and result, as code."""
    condition, change, result = None, "x", None
    for step in steps:
        if step.kind in FILTERS:
            condition = step.code.partition(" if ")[2].removesuffix("]")
        elif step.kind in CHANGES:
            change = step.code.removeprefix("[").partition(" for ")[0]
        else:
            result = step.kind
    return condition, change, result


def slipped(steps: Steps, slip: str, xs: Sequence[int]) -> Any:
    """What the loop gives with a slip."""
    result = steps[-1].kind if steps[-1].ends else None
    before = steps[:-1] if result else steps
    if slip == "early":
        return apply(steps, xs[:1]) if xs else None
    kept = apply(before, xs)
    if slip == "start":
        return [0, *kept] if result is None else 1 + apply(steps, xs)
    if result is None:
        return kept[-1:]
    return (kept[-1] if result == "sum" else 1) if kept else 0


def slips(steps: Steps, inputs: Sequence[Sequence[int]]) -> list[str]:
    """Those that show for some input."""
    return [slip for slip in SLIPS if any(slipped(steps, slip, xs) != apply(steps, xs) for xs in inputs)]
