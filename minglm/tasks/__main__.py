"""Look at problems: `python -m minglm.tasks` lists the families, `python -m minglm.tasks countdown 3` shows one."""

import argparse
import random
import sys

from minglm.tasks import FAMILIES, GROUPS
from minglm.tasks.task import Problem, TaskError, split_of
from minglm.tasks.text import conversation_text, document


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minglm.tasks", description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", help="its name; without one, all are listed")
    parser.add_argument("difficulty", nargs="?", type=int, help="by default its easiest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-thinking", action="store_true")
    options = parser.parse_args(arguments)
    if options.family is None:
        print("\n\n".join(_listed(group) for group in GROUPS))
        return 0
    if options.family not in FAMILIES:
        print(f"no family {options.family!r}; there are {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    family = FAMILIES[options.family]
    try:
        problem = family.sample(random.Random(options.seed), options.difficulty or family.difficulties[0])
    except TaskError as error:
        print(error, file=sys.stderr)
        return 2
    print(_shown(problem, not options.without_thinking))
    return 0


def _listed(group: str) -> str:
    lines = [group]
    for name in GROUPS[group]:
        family = FAMILIES[name]
        difficulties = f"{family.difficulties[0]}-{family.difficulties[-1]}"
        lines.append(f"  {name:24}{difficulties:6}{family.stands_for}")
    return "\n".join(lines)


def _shown(problem: Problem, thinking: bool) -> str:
    """The problem with its solution as text, and what the verifier says of this and of a wrong one."""
    wrong = problem.near_miss(random.Random(0))
    right, miss = problem.verify(problem.demonstrate(thinking)), problem.verify(wrong)
    return (
        f"{document(problem, thinking)}"
        f"Reward of this: {right.reward:g}. Chance: {problem.chance:.3g}. Split: {split_of(problem)}.\n\n"
        f"A near miss:\n{conversation_text(wrong)}"
        f"Reward of that: {miss.reward:g}: {'; '.join(miss.reasons)}."
    )


if __name__ == "__main__":
    sys.exit(main())
