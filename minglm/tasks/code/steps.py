"""What a small function does with a list of integers: a row of steps, each with its words, its code and its meaning.

The meaning is a function of ours, so that right values are known without running any text.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Kind(NamedTuple):
    says: str
    """An order, with {n} for the number."""
    code: str
    """An expression in xs and {n}."""
    does: Callable[[list[int], int], Any]
    numbers: range = range(1)
    ends: bool = False
    """Gives a number, so it is the last step."""
    like: tuple[str, ...] = ()
    """Kinds that are easily mistaken for it."""


KINDS: dict[str, Kind] = {
    "even": Kind(
        "keep the even numbers", "[x for x in xs if x % 2 == 0]", lambda xs, n: [x for x in xs if x % 2 == 0], like=("odd",)
    ),
    "odd": Kind(
        "keep the odd numbers", "[x for x in xs if x % 2 == 1]", lambda xs, n: [x for x in xs if x % 2 == 1], like=("even",)
    ),
    "above": Kind(
        "keep the numbers above {n}",
        "[x for x in xs if x > {n}]",
        lambda xs, n: [x for x in xs if x > n],
        range(0, 7),
        like=("below",),
    ),
    "below": Kind(
        "keep the numbers below {n}",
        "[x for x in xs if x < {n}]",
        lambda xs, n: [x for x in xs if x < n],
        range(2, 9),
        like=("above",),
    ),
    "add": Kind(
        "add {n} to each", "[x + {n} for x in xs]", lambda xs, n: [x + n for x in xs], range(1, 10), like=("subtract", "times")
    ),
    "subtract": Kind(
        "subtract {n} from each", "[x - {n} for x in xs]", lambda xs, n: [x - n for x in xs], range(1, 10), like=("add",)
    ),
    "times": Kind(
        "multiply each by {n}", "[x * {n} for x in xs]", lambda xs, n: [x * n for x in xs], range(2, 10), like=("add",)
    ),
    "square": Kind("square each", "[x * x for x in xs]", lambda xs, n: [x * x for x in xs], like=("double",)),
    "double": Kind("double each", "[x + x for x in xs]", lambda xs, n: [x + x for x in xs], like=("square",)),
    "negate": Kind("negate each", "[-x for x in xs]", lambda xs, n: [-x for x in xs], like=("square",)),
    "sort": Kind("sort them", "sorted(xs)", lambda xs, n: sorted(xs), like=("reverse",)),
    "reverse": Kind("reverse them", "xs[::-1]", lambda xs, n: xs[::-1], like=("sort",)),
    "first": Kind("keep the first {n}", "xs[:{n}]", lambda xs, n: xs[:n], range(1, 5), like=("skip", "last")),
    "last": Kind("keep the last {n}", "xs[-{n}:]", lambda xs, n: xs[-n:], range(1, 5), like=("first",)),
    "skip": Kind("drop the first {n}", "xs[{n}:]", lambda xs, n: xs[n:], range(1, 5), like=("first",)),
    "sum": Kind("return their sum", "sum(xs)", lambda xs, n: sum(xs), ends=True, like=("count",)),
    "count": Kind("return how many they are", "len(xs)", lambda xs, n: len(xs), ends=True, like=("sum",)),
    "largest": Kind(
        "return the largest, or 0 if there is none",
        "max(xs, default=0)",
        lambda xs, n: max(xs, default=0),
        ends=True,
        like=("smallest",),
    ),
    "smallest": Kind(
        "return the smallest, or 0 if there is none",
        "min(xs, default=0)",
        lambda xs, n: min(xs, default=0),
        ends=True,
        like=("largest",),
    ),
}


class Step(NamedTuple):
    kind: str
    number: int = 0

    @property
    def says(self) -> str:
        return KINDS[self.kind].says.format(n=self.number)

    @property
    def code(self) -> str:
        return KINDS[self.kind].code.format(n=self.number)

    @property
    def ends(self) -> bool:
        return KINDS[self.kind].ends

    def apply(self, xs: list[int]) -> Any:
        return KINDS[self.kind].does(xs, self.number)


Steps = tuple[Step, ...]


def apply(steps: Steps, xs: Sequence[int]) -> Any:
    value: Any = list(xs)
    for step in steps:
        value = step.apply(value)
    return value


def orders(steps: Steps) -> str:
    """The steps as a list in words, each one of them once."""
    words = [step.says for step in steps]
    return ", ".join(words if steps[-1].ends else [*words, "return the list"])


def render(name: str, steps: Steps) -> str:
    """The function, one line a step."""
    *lines, last = [step.code for step in steps]
    return "\n".join([f"def {name}(xs):", *(f"    xs = {line}" for line in lines), f"    return {last}"])


def draw(rng: random.Random, count: int, inputs: Sequence[Sequence[int]]) -> Steps:
    """`count` steps of which each one matters for some input, that can be mistaken, and give at least three values.

    So no constant is right for all inputs; and what does nothing in the end is left out, too.
    """
    while True:
        kinds = [rng.choice([name for name in KINDS if not KINDS[name].ends]) for _ in range(count - 1)]
        kinds.append(rng.choice(list(KINDS)))
        steps = tuple(Step(kind, rng.choice(KINDS[kind].numbers)) for kind in kinds)
        values = [apply(steps, xs) for xs in inputs]
        if len(set(map(repr, values))) < 3 or values == [list(xs) for xs in inputs]:
            continue
        shorter = [steps[:place] + steps[place + 1 :] for place in range(count)]
        if all([apply(less, xs) for xs in inputs] != values for less in shorter) and mistakes(steps, inputs):
            return steps


def mistakes(steps: Steps, inputs: Sequence[Sequence[int]]) -> list[Steps]:
    """The steps with one of them wrong, which shows for some input: another number, or a kind that is like it."""
    values = [apply(steps, xs) for xs in inputs]
    found = []
    for place, step in enumerate(steps):
        numbers = [number for number in KINDS[step.kind].numbers if abs(number - step.number) == 1]
        others = [Step(step.kind, number) for number in numbers]
        others += [Step(kind, _near(step.number, KINDS[kind].numbers)) for kind in KINDS[step.kind].like]
        wrong = [steps[:place] + (other,) + steps[place + 1 :] for other in others]
        found += [one for one in wrong if [apply(one, xs) for xs in inputs] != values]
    return found


def _near(number: int, numbers: range) -> int:
    return min(max(number, numbers[0]), numbers[-1])


INPUTS: tuple[tuple[int, ...], ...] = tuple(
    tuple(random.Random(seed).choices(range(-6, 13), k=length)) for seed, length in enumerate((0, 1, 2, 4, 5, 6, 7, 8))
)
"""What hidden tests call the functions with: the same for all problems, so that the same problem has the same tests."""
