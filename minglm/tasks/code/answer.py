"""Problems whose answer is the text of a function: how it is read, and judged by hidden tests in the sandbox."""

import functools
import json
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minglm.tasks.sandbox import Case, Limits, run_function_tests, same_value
from minglm.tasks.task import Message, Problem, Verdict, final_content, reply

LIMITS = Limits(cpu=1.0, wall=10.0)
NAMES = ("f", "g", "solve", "work")


@dataclass(frozen=True)
class WritesCode(Problem):
    """All or nothing: reward 1 if the function passes every hidden test.

    Chance is 0: a guess knows the form, and so returns the argument or a plain constant; every problem's right values
    are of at least three kinds, and never all the argument. It is computed nevertheless, from the guesses and the tests.
    """

    wording: int
    name: str

    @property
    @abstractmethod
    def solution(self) -> str:
        """A right answer."""

    @property
    @abstractmethod
    def thinking(self) -> str:
        """How to come to it."""

    @property
    @abstractmethod
    def cases(self) -> tuple[Case, ...]:
        """The hidden tests."""

    @property
    @abstractmethod
    def guesses(self) -> tuple[tuple[str, object], ...]:
        """What a guess returns: the expression, and a function of ours from the argument to its value."""

    @property
    def files(self) -> Mapping[str, str]:
        """What lies beside the answer when it is tested."""
        return {}

    def whole(self, code: str) -> str:
        """The file that is tested."""
        return code

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.solution, self.thinking if thinking else None)

    def verify(self, response: Sequence[Message]) -> Verdict:
        code = read_code(final_content(response))
        if f"def {self.name}" not in code and f"{self.name} =" not in code:
            return Verdict(0.0, (f"wanted the code of a function {self.name} as the content",))
        reason = _first_failure(self.whole(code), self.name, json.dumps(self.cases), json.dumps(dict(self.files)))
        return Verdict(0.0, (reason,)) if reason else Verdict(1.0)

    def guess(self, rng: random.Random) -> list[Message]:
        return reply(function(self.name, rng.choice(self.guesses)[0]))

    @property
    def chance(self) -> float:
        passed = [all(same_value(value(*case.arguments), case.expected) for case in self.cases) for _, value in self.guesses]
        return sum(passed) / len(passed)


def function(name: str, expression: str, argument: str = "x") -> str:
    return f"def {name}({argument}):\n    return {expression}"


def read_code(content: str) -> str:
    """What stands between fences, if there are any; else all of it."""
    _, fence, rest = content.partition("```")
    if not fence:
        return content.strip()
    language, _, code = rest.partition("\n")
    return code.partition("```")[0].strip() if language.strip() in ("", "python", "py") else ""


@functools.lru_cache(4096)  # a group of samples often holds the same answer several times
def _first_failure(source: str, name: str, cases: str, files: str) -> str:
    """Why the first case fails that does; empty if none does. Cases and files as JSON, so that they can be looked up."""
    tests = [Case(*case) for case in json.loads(cases)]
    results = run_function_tests(source, name, tests, files=json.loads(files), limits=LIMITS)
    return next((result.reason for result in results if not result), "")
