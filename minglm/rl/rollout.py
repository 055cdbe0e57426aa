"""Rollouts: a policy at work in the task world, turn by turn, token in and token out.

The ids that the policy sampled are kept and trained on as they are. What the world answers is appended behind them, by the
template's own pieces; nothing is ever rendered a second time, so no template can drop or change what was sampled
(verl-project/verl#6854 and many others). Results of tools are in the context and are not trained on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minglm.chat import MODES, OPENS_THINKING, ChatError, parse, render_tokens
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.engine.sequence import RequestOutput
from minglm.rl.environment import Answer, Environment, Environments, Failure, Question
from minglm.rl.recipe import Mode, Sampling
from minglm.tasks.task import Message, Problem, Verdict
from minglm.tokenizer import Tokenizer

End = Literal["done", "length", "turns", "malformed", "failed"]
"""Why a trajectory ended: the episode was over; its turn, or the whole, was cut off; it had no more turns; a call could not be
read, which ends the episode at once (the report's process action format penalty, section 3.2.4); the environment broke, or
left no room for an answer."""


@dataclass
class Trajectory:
    """One attempt at a problem. `ids` are everything, the prompt first; the other lists are as long.

    sampled: which ids the policy chose, and learns from. log_probs: of these under the policy that chose them, at
    `temperature`, natural logarithm; 0 elsewhere. versions: of the policy's weights that wrote an id; -1 elsewhere. verdict is
    None where the attempt has failed, by no fault of the policy's, and failure says why: no reward, which is not a reward of 0.
    """

    problem: Problem
    ids: list[int]
    sampled: list[bool]
    log_probs: list[float]
    versions: list[int]
    response: list[Message] = field(default_factory=list)
    verdict: Verdict | None = None
    end: End = "done"
    failure: Failure | None = None
    temperature: float = 1.0
    experts: Tensor | None = None  # of the sampler, (len(ids) - 1, MoE layers, K) int16: the last id is never read; if recorded
    parts: dict[str, float] = field(default_factory=dict)
    """What each source of rewards has said (minglm.rl.rewards)."""

    @property
    def written(self) -> list[bool]:
        """Which ids the policy wrote, those included that it does not learn from."""
        return [version >= 0 for version in self.versions]

    @property
    def length(self) -> int:
        """Tokens that the policy wrote."""
        return sum(self.written)

    @property
    def pathological(self) -> bool:
        """Whether it was cut off, could not be read, or has what the rules against pathologies name, if these were asked."""
        return self.end in ("length", "malformed") or self.parts.get("pathology", 1.0) < 1

    @property
    def turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.response)


@dataclass(frozen=True)
class Limits:
    """thinking: True and None leave it to the policy, False forbids it. opens_thinking: every turn begins within a thinking
    that the prompt has opened, and that is not closed at once: the first token, which is drawn among the others, is no choice
    of the policy's to learn from. learns_to_decide: otherwise it is. tokens: of one turn; turns: of one attempt; context:
    tokens of an attempt that the model reads (None: as many as it has positions); seconds: for the environment to answer a
    turn. Raises ValueError for whole numbers below 1, for others that are not above 0, and for a thinking that is opened and
    forbidden."""

    tokens: int = 256
    turns: int = 8
    temperature: float = 1.0
    thinking: bool | None = True
    format_penalty: bool = True
    context: int | None = None
    seconds: float = 300.0
    opens_thinking: bool = False
    learns_to_decide: bool = True

    def __post_init__(self) -> None:
        if self.opens_thinking and self.thinking is False:
            raise ValueError("opens_thinking with thinking False: wanted one of them")
        for name in ("tokens", "turns", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: wanted 1 or more")
        for name in ("temperature", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: wanted above 0")

    @classmethod
    def of(cls, sampling: Sampling) -> "Limits":
        """Those of a recipe, at its temperature and full length, in its first mode."""
        s = sampling
        limits = cls(
            max(s.stages),
            s.turns,
            s.temperature,
            format_penalty=s.format_penalty,
            context=s.context,
            seconds=s.environment_seconds,
            learns_to_decide=s.learns_to_decide,
        )
        return limits.in_mode_of(s, 0)

    def in_mode_of(self, sampling: Sampling, number: int) -> "Limits":
        """In the mode that a recipe deals out to the problem of this number."""
        return self.in_mode(sampling.modes[number % len(sampling.modes)], sampling.opens_thinking)

    def in_mode(self, mode: Mode, opens_thinking: bool) -> "Limits":
        """opens_thinking: by the prompt, in the mode "thinking"."""
        return replace(self, thinking=MODES[mode], opens_thinking=opens_thinking and mode == "thinking")


class Asked(NamedTuple):
    """A problem to attempt, the seed of everything that is drawn for it, and limits of its own: None for the rollouts'."""

    problem: Problem
    seed: int
    limits: Limits | None = None


Judge = Callable[[Sequence[Trajectory]], None]
"""Changes verdicts in place (minglm.rl.rewards)."""


class Rollouts:
    """Attempts at problems by an engine's policy, as many side by side as the engine runs.

    Environments that are due at the same time answer at the same time, in threads, and the policy goes on when all of these
    have: so what is computed together, and with it every bit, does not depend on who was faster.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        limits: Limits,
        records_experts: bool = False,
        judge: Judge | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """records_experts: keep which experts each token went to. Prompts are then computed for each attempt anew. judge: puts
        other verdicts in place of those of the problems' verifiers. autocast: the trainer's (`minglm.train.device.Device`), so
        that sampler and trainer compute in one precision."""
        self.engine, self.tokenizer, self.limits, self.records_experts = engine, tokenizer, limits, records_experts
        self.judge, self.autocast = judge, autocast
        self.environments = Environments(limits.seconds)

    @property
    def context(self) -> int:
        """Tokens of an attempt that the model reads, at most; it may choose one more, which is never read."""
        positions = self.engine.model.config.max_position_embeddings
        return min(self.limits.context or positions, positions)

    def step(self) -> list[RequestOutput]:
        """The engine's."""
        with self.autocast():
            return self.engine.step()

    def collect(self, asked: Sequence[Asked]) -> list[Trajectory]:
        """Attempt all problems -> their trajectories, in order.

        Raises ChatError if a problem itself cannot be put into the template, HangingEnvironments.
        """
        attempts = [Attempt(self, one) for one in asked]
        by_request = {attempt.ask(): attempt for attempt in attempts if attempt.has_room()}
        try:
            while by_request:
                ended = []
                for output in self.step():
                    attempt = by_request[output.request_id]
                    attempt.take(output)
                    if output.finish_reason is not None:
                        ended.append(by_request.pop(output.request_id))
                speaking = [(attempt, question) for attempt in ended if (question := attempt.end_turn()) is not None]
                answers = self.environments.ask([question for _, question in speaking])
                for (attempt, _), answer in zip(speaking, answers, strict=True):
                    if attempt.hear(answer):
                        by_request[attempt.ask()] = attempt
        finally:
            for request in by_request:
                self.engine.cancel(request)
        trajectories = [attempt.trajectory for attempt in attempts]
        if self.judge is not None:
            self.judge(trajectories)
        return trajectories


class Attempt:
    """A trajectory on its way: if it `has_room`, `ask` queues a turn, `take` keeps what the engine writes, and when that has
    ended, `end_turn` says what to ask the environment, whose answer `hear` takes; then `ask` again if it says so."""

    def __init__(self, rollouts: Rollouts, asked: Asked):
        self.rollouts, self.problem, self.seed = rollouts, asked.problem, asked.seed
        self.limits = asked.limits or rollouts.limits
        problem = self.problem
        self.environment = Environment(problem)
        self.think_id = rollouts.tokenizer.special_ids["<think>"]
        self.trajectory = Trajectory(problem, [], [], [], [], temperature=self.limits.temperature)
        self._append(self._render(problem.messages))
        self.text, self.finish = "", ""
        self.experts: list[Tensor] = []  # of this turn, from the first id on

    def has_room(self) -> bool:
        """For an answer to the problem; without, the attempt has failed before it began."""
        if self._room >= 1:
            return True
        length, context = len(self.trajectory.ids), self.rollouts.context
        return self._fail(Failure("context", f"the problem's {length} tokens leave no room for an answer in {context}"))

    def ask(self) -> int:
        """Queue the next turn -> the id of the request."""
        limits = self.limits
        self.text, self.experts = "", []
        return self.rollouts.engine.add(
            self.trajectory.ids,
            SamplingParams(
                temperature=limits.temperature,
                # A draw depends on seed and position, so that turns, which stand elsewhere, may share the seed.
                seed=self.seed,
                max_tokens=min(limits.tokens, self._room),
                logprobs=0,
                at_temperature=True,
                return_experts=self.rollouts.records_experts,
                must_think=limits.opens_thinking,
            ),
        )

    @property
    def _room(self) -> int:
        return self.rollouts.context - len(self.trajectory.ids) + 1

    def take(self, output: RequestOutput) -> None:
        version = self.rollouts.engine.weights_version
        decides = self.limits.learns_to_decide and not self.limits.opens_thinking
        for id, log_prob in zip(output.new_ids, output.logprobs, strict=True):
            learnt = decides or self.trajectory.ids[-1] != self.think_id
            self._append([id], [log_prob] if learnt else None, version)
        self.text += output.text
        if output.experts is not None:
            self.experts.append(output.experts.to(torch.int16))
        self.finish = output.finish_reason or ""

    def end_turn(self) -> Question | None:
        """The policy has spoken -> what to ask the environment; None if the attempt has ended without it."""
        trajectory, tools, limits = self.trajectory, self.problem.tools, self.limits
        if self.experts:  # earlier turns are computed again, but what was sampled then has seen the experts of then
            known = trajectory.experts
            parts = self.experts if known is None else [known, torch.cat(self.experts)[len(known) :]]
            trajectory.experts = torch.cat(parts)
        if self.finish == "length":
            return self._lose("length", "cut off")
        text = OPENS_THINKING + self.text if limits.opens_thinking else self.text
        try:
            message = parse(text, tools or None)
        except ChatError:
            if tools and limits.format_penalty:
                return self._lose("malformed", "a malformed call")
            message = {"role": "assistant", "content": text}
        trajectory.response.append(message)
        return partial(self.environment.answer, list(trajectory.response), trajectory.turns >= limits.turns)

    def hear(self, answer: Answer | Failure) -> bool:
        """The environment has spoken -> whether the policy is asked again."""
        trajectory = self.trajectory
        if isinstance(answer, Failure):
            return self._fail(answer)
        trajectory.response += answer.follows
        if answer.verdict is not None:
            trajectory.end, trajectory.verdict = "done" if answer.done else "turns", answer.verdict
            return False
        ids = self._answer_ids(answer.follows)
        if trajectory.ids[-1] != ids[0]:  # it named another speaker than the one whose turn it is
            self._lose("malformed", "a malformed call")
            return False
        self._append(ids[1:])
        if self._room < 1:
            self._lose("length", "cut off")
        return self._room >= 1

    def _answer_ids(self, messages: Sequence[Message]) -> list[int]:
        """What follows a turn of the policy's: the world's messages, and the mark behind which the policy goes on."""
        turn = {"role": "assistant", "content": ""}  # any: what follows it does not depend on it
        asked, tools = [*self.problem.messages, turn], self.problem.tools or None
        before = render_tokens(self.rollouts.tokenizer, asked, tools, self.limits.thinking).ids
        return self._render([*asked, *messages])[len(before) :]

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return render_tokens(
            self.rollouts.tokenizer,
            messages,
            self.problem.tools or None,
            self.limits.thinking,
            add_generation_prompt=True,
            opens_thinking=self.limits.opens_thinking,
        ).ids

    def _lose(self, end: End, reason: str) -> None:
        self.trajectory.end, self.trajectory.verdict = end, Verdict(0.0, (reason,))

    def _fail(self, failure: Failure) -> bool:
        self.trajectory.end, self.trajectory.failure = "failed", failure
        return False

    def _append(self, ids: list[int], log_probs: list[float] | None = None, version: int = -1) -> None:
        trajectory, count = self.trajectory, len(ids)
        trajectory.ids += ids
        trajectory.sampled += [log_probs is not None] * count
        trajectory.log_probs += [0.0] * count if log_probs is None else log_probs
        trajectory.versions += [version] * count


def groups_of(trajectories: Sequence[Trajectory], size: int) -> Iterator[Sequence[Trajectory]]:
    """Neighbours, `size` at a time: the attempts at one problem."""
    for start in range(0, len(trajectories), size):
        yield trajectories[start : start + size]
