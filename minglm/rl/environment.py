"""The world's side of an attempt: what it says to a turn, and the verdict at the end, asked for in threads.

An environment may break, hang, or judge by something that is no number. None of that is the policy's fault, so none of it is
a reward: such an attempt has failed, for a reason that is kept and counted.
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple

from minglm.tasks.task import Episode, Message, Problem, Verdict

AT_A_TIME = 64  # environments that answer: they wait for sandboxes, not for a core


class HangingEnvironments(RuntimeError):
    """So many environments have not come back that something is wrong with all of them."""


class Answer(NamedTuple):
    """What the world says to a turn. verdict: None while the attempt goes on; done: whether the episode itself has ended."""

    follows: list[Message]
    done: bool
    verdict: Verdict | None


class Failure(NamedTuple):
    """Why there is no answer. kind: "time-out", "reward" for one that is not finite, else the name of what was raised."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


Question = Callable[[], Answer | Failure]


class Environment:
    """The world of one attempt at `problem`. It starts when it is first asked, so that one that cannot start has failed like
    one that breaks later."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self._episode: Episode | None = None

    def answer(self, response: list[Message], last: bool) -> Answer | Failure:
        """To a response that ends with a new message of the policy's; last: there will be no other one.

        Raises whatever the problem's code does: a sandbox that cannot be had, a gold answer that cannot be read.
        """
        if self._episode is None:
            self._episode = self.problem.start()
        follows = self._episode.step(response[-1])
        done = self._episode.done
        if not (done or last):
            return Answer(follows, False, None)
        verdict = self.problem.verify([*response, *follows])
        if not math.isfinite(verdict.reward):
            return Failure("reward", f"{verdict.reward} of {self.problem.family} is not finite")
        return Answer(follows, done, verdict)


class Environments:
    """Asks many environments at the same time, and waits so many seconds for each.

    What has not answered by then has failed. Python cannot stop a thread: the one that waits is left behind as a daemon, which
    ends with its call or with the process, and what it still says is not heard. Where more than `AT_A_TIME` have been left
    behind and still run, `hear` raises HangingEnvironments. A call that never gives back the interpreter's lock, such as a
    regular expression that backtracks for hours, stops this process too: code like that belongs into the sandbox, which kills
    it. Which attempts are too slow depends on the clock, so a run in which some are is not the same when it runs again.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.hanging: list[Future[Answer | Failure]] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer | Failure]:
        """Ask all, `AT_A_TIME` at the same time -> what they answered, in order; a Failure for what was raised."""
        found: list[Answer | Failure] = []
        for start in range(0, len(questions), AT_A_TIME):
            asked = [self.start(question) for question in questions[start : start + AT_A_TIME]]
            wait(asked, self.seconds)
            found += map(self.hear, asked)
        return found

    def start(self, question: Question) -> "Future[Answer | Failure]":
        """Ask, in a thread of its own."""
        asked: Future[Answer | Failure] = Future()

        def listen() -> None:
            try:
                asked.set_result(question())
            except BaseException as error:  # whatever it is: the attempt has failed, the run has not
                asked.set_result(Failure(type(error).__name__, str(error)))

        threading.Thread(target=listen, daemon=True).start()
        return asked

    def hear(self, asked: "Future[Answer | Failure]") -> Answer | Failure:
        """The answer; where there is none yet, it is too late."""
        if asked.done():
            return asked.result()
        self.hanging = [one for one in (*self.hanging, asked) if not one.done()]
        if len(self.hanging) > AT_A_TIME:
            raise HangingEnvironments(
                f"{len(self.hanging)} environments have not answered within {self.seconds:g} s each and still run; the same "
                "command goes on from the newest checkpoint when this is put right"
            )
        return Failure("time-out", f"no answer within {self.seconds:g} s")
