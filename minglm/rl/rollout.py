"""Rollouts: a policy at work in the task world, turn by turn, token in and token out.

The ids that the policy sampled are kept and trained on as they are. What the world answers is appended behind them, by the
template's own pieces; nothing is ever rendered a second time, so no template can drop or change what was sampled
(verl-project/verl#6854 and many others). Results of tools are in the context and are not trained on.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from minglm.chat import MODES, ChatError, parse, render_tokens
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.engine.sequence import RequestOutput
from minglm.rl.recipe import Sampling
from minglm.tasks.sandbox import SandboxError
from minglm.tasks.task import Episode, Message, Problem, Verdict
from minglm.tokenizer import Tokenizer

ENVIRONMENTS = 64  # that answer at a time: they wait for sandboxes, not for a core

End = Literal["done", "length", "turns", "malformed", "failed"]
"""Why a trajectory ended: the episode was over; its turn, or the whole, was cut off; it had no more turns; a call could not be
read, which ends the episode at once (the report's process action format penalty, section 3.2.4); the environment broke."""


@dataclass
class Trajectory:
    """One attempt at a problem. `ids` are everything, the prompt first; the other lists are as long.

    sampled: which ids the policy chose. log_probs: of these under the policy that chose them, temperature 1, natural
    logarithm; 0 elsewhere. versions: of the policy's weights; -1 elsewhere. verdict is None where the environment failed:
    such a trajectory has no reward, which is not a reward of 0.
    """

    problem: Problem
    ids: list[int]
    sampled: list[bool]
    log_probs: list[float]
    versions: list[int]
    response: list[Message] = field(default_factory=list)
    verdict: Verdict | None = None
    end: End = "done"

    @property
    def length(self) -> int:
        """Tokens that the policy chose."""
        return sum(self.sampled)

    @property
    def turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.response)


@dataclass(frozen=True)
class Limits:
    """thinking: True and None leave it to the policy, False forbids it. tokens: of one turn; turns: of one attempt. Raises
    ValueError for limits below 1 and a temperature that is not above 0."""

    tokens: int = 256
    turns: int = 8
    temperature: float = 1.0
    thinking: bool | None = True
    format_penalty: bool = True

    def __post_init__(self) -> None:
        wanted = {"tokens": self.tokens >= 1, "turns": self.turns >= 1, "temperature": self.temperature > 0}
        for name, holds in wanted.items():
            if not holds:
                raise ValueError(
                    f"{name} = {getattr(self, name)}: wanted {'above 0' if name == 'temperature' else '1 or more'}"
                )

    @classmethod
    def of(cls, sampling: Sampling) -> "Limits":
        """Those of a recipe."""
        s = sampling
        return cls(s.tokens, s.turns, s.temperature, MODES[s.thinking], s.format_penalty)


class Asked(NamedTuple):
    """A problem to attempt, and the seed of everything that is drawn for it."""

    problem: Problem
    seed: int


class Rollouts:
    """Attempts at problems by an engine's policy, as many side by side as the engine runs.

    Environments that are due at the same time answer at the same time, in threads, and the policy goes on when all of these
    have: so what is computed together, and with it every bit, does not depend on who was faster.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: Limits):
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits

    def collect(self, asked: Sequence[Asked]) -> list[Trajectory]:
        """Attempt all problems -> their trajectories, in order.

        Raises ChatError if a problem itself cannot be put into the template, ValueError if it leaves no room for an answer.
        """
        attempts = [Attempt(self, *one) for one in asked]
        by_request = {attempt.ask(): attempt for attempt in attempts}
        with ThreadPoolExecutor(ENVIRONMENTS) as threads:
            try:
                while by_request:
                    ended = []
                    for output in self.engine.step():
                        attempt = by_request[output.request_id]
                        attempt.take(output)
                        if output.finish_reason is not None:
                            ended.append(by_request.pop(output.request_id))
                    for attempt, goes_on in zip(ended, threads.map(Attempt.answer, ended), strict=True):
                        if goes_on:
                            by_request[attempt.ask()] = attempt
            finally:
                for request in by_request:
                    self.engine.cancel(request)
        return [attempt.trajectory for attempt in attempts]

    def answer_ids(self, problem: Problem, messages: Sequence[Message]) -> list[int]:
        """What follows a turn of the policy's: the world's messages, and the mark behind which the policy goes on."""
        turn = {"role": "assistant", "content": ""}  # any: what follows it does not depend on it
        thinking, tools = self.limits.thinking, problem.tools or None
        before = render_tokens(self.tokenizer, [*problem.messages, turn], tools, thinking).ids
        return self._render([*problem.messages, turn, *messages], problem)[len(before) :]

    def _render(self, messages: Sequence[Message], problem: Problem) -> list[int]:
        return render_tokens(
            self.tokenizer, messages, problem.tools or None, self.limits.thinking, add_generation_prompt=True
        ).ids


class Attempt:
    """A trajectory on its way: `ask` queues a turn, `take` keeps what the engine writes, and when the turn has ended, `answer`
    lets the world reply; then `ask` again if it says so."""

    def __init__(self, rollouts: Rollouts, problem: Problem, seed: int):
        self.rollouts, self.problem, self.seed = rollouts, problem, seed
        self.episode: Episode = problem.start()
        ids = rollouts._render(problem.messages, problem)
        self.trajectory = Trajectory(problem, [], [], [], [])
        self._append(ids)
        self.text, self.finish = "", ""

    def ask(self) -> int:
        """Queue the next turn -> the id of the request."""
        trajectory, limits = self.trajectory, self.rollouts.limits
        room = self._room
        if room < 1:
            raise ValueError(
                f"a problem of family {self.problem.family} has {len(trajectory.ids)} tokens: the model's positions leave no "
                "room for an answer; wanted easier problems, or a model with more positions"
            )
        self.text = ""
        return self.rollouts.engine.add(
            trajectory.ids,
            SamplingParams(
                temperature=limits.temperature,
                # A draw depends on seed and position, so that turns, which stand elsewhere, may share the seed.
                seed=self.seed,
                max_tokens=min(limits.tokens, room),
                logprobs=0,
            ),
        )

    @property
    def _room(self) -> int:
        return self.rollouts.engine.model.config.max_position_embeddings - len(self.trajectory.ids) + 1

    def take(self, output: RequestOutput) -> None:
        version = self.rollouts.engine.weights_version
        self._append(output.new_ids, output.logprobs, version)
        self.text += output.text
        self.finish = output.finish_reason or ""

    def answer(self) -> bool:
        """The turn has ended: the world answers -> whether the policy is asked again."""
        trajectory, tools = self.trajectory, self.problem.tools
        if self.finish == "length":
            return self._ended("length")
        try:
            message = parse(self.text, tools or None)
        except ChatError:
            if tools and self.rollouts.limits.format_penalty:
                return self._ended("malformed")
            message = {"role": "assistant", "content": self.text}
        trajectory.response.append(message)
        try:
            follows = self.episode.step(message)
            trajectory.response += follows
            if self.episode.done:
                return self._ended("done")
            if trajectory.turns >= self.rollouts.limits.turns:
                return self._ended("turns")
            ids = self.rollouts.answer_ids(self.problem, follows)
        except (OSError, SandboxError) as error:  # not the policy's fault
            trajectory.end = "failed"
            trajectory.response.append({"role": "tool", "content": f"environment failed: {error}"})
            return False
        if trajectory.ids[-1] != ids[0]:  # it named another speaker than the one whose turn it is
            return self._ended("malformed")
        self._append(ids[1:])
        return self._room >= 1 or self._ended("length")

    def _ended(self, end: End) -> bool:
        trajectory = self.trajectory
        trajectory.end = end
        if end == "malformed":
            trajectory.verdict = Verdict(0.0, ("a malformed call",))
        elif end == "length":
            trajectory.verdict = Verdict(0.0, ("cut off",))
        else:
            trajectory.verdict = self.problem.verify(trajectory.response)
        return False

    def _append(self, ids: list[int], log_probs: list[float] | None = None, version: int = -1) -> None:
        trajectory, count = self.trajectory, len(ids)
        trajectory.ids += ids
        trajectory.sampled += [log_probs is not None] * count
        trajectory.log_probs += log_probs or [0.0] * count
        trajectory.versions += [version] * count


def groups_of(trajectories: Sequence[Trajectory], size: int) -> Iterator[Sequence[Trajectory]]:
    """Neighbours, `size` at a time: the attempts at one problem."""
    for start in range(0, len(trajectories), size):
        yield trajectories[start : start + size]
