"""Workers and time, played: the exchange under a clock that jumps from event to event.

Episodes, loading of weights, kills and lost replies take the durations and come at the moments that a seed draws, so one
seed is one schedule, whatever the machine does. The exchange is the real one. The trainer is whoever moves the clock.
"""

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from minglm.rl.asynchronous.buffer import Lease
from minglm.rl.asynchronous.exchange import Exchange
from minglm.rl.asynchronous.messages import Span


@dataclass(frozen=True)
class Durations:
    """Virtual seconds. Episodes are log-normal, as agents' are: a median, and the spread of the logarithm."""

    episode: float = 1.0
    episode_spread: float = 1.0
    training: float = 1.0
    weights: float = 0.1
    """To bring new ones to a worker."""
    poll: float = 0.1
    """From one question of an idle worker to the next."""
    death: float = math.inf
    """A worker lives so long on average, and is back after `restart`."""
    restart: float = 1.0
    silence: float = math.inf
    """A worker hangs after so long on average, for `silence_length`, and then goes on as if nothing had been."""
    silence_length: float = 10.0
    lost_replies: float = 0.0
    """The share of deliveries that are sent again, because the reply did not arrive."""


class VirtualClock:
    """Seconds since the beginning, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Events of the same moment happen in the order in which they were planned."""
        if seconds < math.inf:
            heapq.heappush(self._events, (self.now + seconds, self._count, action))
            self._count += 1

    def step(self) -> None:
        """The next event. Raises RuntimeError where nothing will ever happen again."""
        if not self._events:
            raise RuntimeError("nothing is planned any more, and somebody still waits")
        self.now, _, action = heapq.heappop(self._events)
        action()

    def advance(self, seconds: float) -> None:
        """Everything up to so many seconds from now."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.step()
        self.now = end


class Sampled(NamedTuple):
    """What an attempt gave: as `Exchange.deliver` takes it. seconds: that it takes beside its environment, or 0."""

    result: Any
    reward: float | None
    oldest: int
    seconds: float = 0.0


class VirtualWorker:
    """Polls, attempts, delivers; dies and hangs. exchange: the present one, None while the trainer is down.

    sample: is told the leases of a poll when they arrive, and gives what each will have become. record: is told what it did.
    """

    def __init__(
        self,
        name: str,
        room: int,
        durations: Durations,
        clock: VirtualClock,
        exchange: Callable[[], Exchange | None],
        sample: Callable[[Sequence[Lease]], Sequence[Sampled]],
        seed: int,
        record: Callable[[Span], None] = lambda span: None,
    ):
        self.name, self.room, self.durations, self.clock = name, room, durations, clock
        self.exchange, self.sample, self.record = exchange, sample, record
        self.rng = random.Random(f"{seed} {name}")
        self.life = 0  # how often it has died: what an earlier life planned does not happen
        self._begin()

    def _begin(self) -> None:
        self.version = -1
        self.held: dict[int, Sampled] = {}
        self.silent_until = 0.0
        self._plan(0.0, self._poll)
        self._plan(self._around(self.durations.death), self._die)
        self._plan(self._around(self.durations.silence), self._hang)

    def _around(self, mean: float) -> float:
        return self.rng.expovariate(1 / mean) if mean < math.inf else math.inf

    def _plan(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        life = self.life

        def happen() -> None:
            if self.life != life:
                return
            if self.clock.now < self.silent_until and action not in (self._die, self._hang):
                self._plan(self.silent_until - self.clock.now, action, *arguments)
                return
            action(*arguments)

        self.clock.after(seconds, happen)

    def _die(self) -> None:
        self.life += 1
        self.clock.after(self.durations.restart, self._begin)

    def _hang(self) -> None:
        self.silent_until = self.clock.now + self.durations.silence_length
        self._plan(self.durations.silence_length + self._around(self.durations.silence), self._hang)

    @property
    def _id(self) -> str:
        return f"{self.name}.{self.life}"

    def _poll(self) -> None:
        exchange = self.exchange()
        if exchange is None:
            self._plan(self.durations.poll, self._poll)
            return
        exchange.give_up_silent()
        answer = exchange.poll(self._id, self.version, self.room - len(self.held), list(self.held))
        for lease in answer.void:
            del self.held[lease]
        if answer.version != self.version:
            self._span("weights", self.durations.weights)
            self._plan(self.durations.weights, self._load, answer.version)
            return
        found = self.sample(answer.leases) if answer.leases else ()
        for lease, one in zip(answer.leases, found, strict=True):
            self.held[lease.number] = one
            wait = self.durations.episode * math.exp(self.rng.gauss(0, self.durations.episode_spread))
            self._span("episode", one.seconds + wait)
            self._plan(one.seconds + wait, self._finish, lease.number)
        self._plan(self.durations.poll, self._poll)

    def _load(self, version: int) -> None:
        self.version = version
        self._poll()

    def _finish(self, lease: int) -> None:
        if lease not in self.held:
            return
        exchange = self.exchange()
        if exchange is None:
            self._plan(self.durations.poll, self._finish, lease)
            return
        exchange.deliver(self._id, lease, *self.held[lease][:3])
        if self.rng.random() < self.durations.lost_replies:
            self._plan(self.durations.poll, self._finish, lease)
        else:
            del self.held[lease]

    def _span(self, what: str, seconds: float) -> None:
        self.record(Span(who=self.name, what=what, start=self.clock.now, end=self.clock.now + seconds))
