"""Which attempts are to be made, and which groups the trainer gets: the rules of the asynchronous mode.

Without clock, threads or files: what the buffer does follows from the calls in their order alone, so that a schedule can be
replayed. A problem is a group of attempts. An attempt is handed out under a lease and delivered once under that lease; a
lease that is given up makes the attempt free for another, and what still comes under it is refused.

Staleness. The weights of version v are those after v steps. A token is `step - version` steps old when the weights that have
done `step` steps are trained on it. Nothing older than `max_staleness` is ever trained on, and nothing is thrown away for its
age, because both ends of the buffer take care:
  - a group is opened only if the trainer, taking so many groups a step, will come to all that are open in time
    (admission control, as in AReaL, 2505.24298, section 5.1);
  - the trainer takes those first that are due first, and waits where one would come too late.
With max_staleness 0 workers and trainer take turns, and every token is on policy.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from minglm.rl.objective import SPREAD

TRIES = 3  # of an attempt whose environment failed, before the failure is taken for its result


class ScheduleError(ValueError):
    """A call that breaks the rules: by a fault of ours, or of a worker that is not one of ours."""


class Lease(NamedTuple):
    """The right to make one attempt. version: of the weights when it was handed out; no token may be older."""

    number: int
    group: int
    attempt: int
    version: int
    order: Any  # which problem: whatever `open` was given


@dataclass
class Slot:
    """An attempt of a group: free (lease < 0), leased, or delivered. result, reward: what was delivered; reward None where
    the environment failed. failures: of environments so far."""

    lease: int = -1
    worker: str = ""
    version: int = -1
    delivered: bool = False
    result: Any = None
    reward: float | None = None
    failures: int = 0


@dataclass
class Group:
    """The attempts at one problem."""

    number: int
    order: Any
    slots: list[Slot]

    @property
    def whole(self) -> bool:
        return all(slot.delivered for slot in self.slots)

    @property
    def oldest(self) -> float:
        """The oldest version that a token of it may have; infinity where no attempt is leased or delivered."""
        return min((slot.version for slot in self.slots if slot.lease >= 0), default=math.inf)

    @property
    def failed(self) -> bool:
        return any(slot.delivered and slot.reward is None for slot in self.slots)

    @property
    def flat(self) -> bool:
        """Whole, and without a spread of rewards: nothing to learn where attempts are judged against one another."""
        rewards = [slot.reward for slot in self.slots]
        return max(rewards) - min(rewards) <= SPREAD


@dataclass
class Batch:
    """What one step takes: groups to train on, the ones due first in front; and the groups put aside since the step before,
    for a failed environment or for want of a spread, which are counted and not trained on."""

    groups: list[Group] = field(default_factory=list)
    aside: list[Group] = field(default_factory=list)


class Buffer:
    """The state, and the rules as methods; those that change the state take and return what JSON can hold, but for `take`.

    size: attempts of a group. groups: of a step, at most. rounds: of dynamic sampling as in `minglm.rl.recipe.Sampling`: above
    1, whole groups without a spread are replaced; a step waits for at most rounds x groups. max_staleness: in steps.
    """

    def __init__(self, size: int, groups: int, rounds: int, max_staleness: int):
        self.size, self.groups, self.rounds, self.max_staleness = size, groups, rounds, max_staleness
        self.version = 0  # published: what workers sample with
        self.step = 0  # batches taken: version, or one more while a step is under way
        self.opened = self.leased = 0
        self.open_groups: dict[int, Group] = {}  # by number
        self.aside: list[Group] = []
        self.taken: dict[int, Batch] = {}  # by step; a trainer that comes back takes them again

    # ---------------------------------------------------------------------------------------------------------- workers

    @property
    def admits(self) -> bool:
        """Whether one more group, started now, will be trained on in time."""
        return len(self.open_groups) < (self.version + self.max_staleness - self.step + 1) * self.groups

    def open(self, order: Any) -> None:
        """Start a group. Raises ScheduleError where it is not admitted."""
        if not self.admits:
            raise ScheduleError(f"group {self.opened} is not admitted: {len(self.open_groups)} are open, step {self.step}")
        self.open_groups[self.opened] = Group(self.opened, order, [Slot() for _ in range(self.size)])
        self.opened += 1

    def lease(self, worker: str) -> Lease | None:
        """Hand out the first free attempt, of the oldest group; None where all are taken."""
        for group in self.open_groups.values():
            for attempt, slot in enumerate(group.slots):
                if slot.lease < 0:
                    slot.lease, slot.worker, slot.version = self.leased, worker, self.version
                    self.leased += 1
                    return Lease(slot.lease, group.number, attempt, slot.version, group.order)
        return None

    def give_up(self, leases: list[int]) -> None:
        """These leases are void, their attempts free again. Delivered and unknown ones: nothing."""
        for slot in self._slots():
            if slot.lease in leases and not slot.delivered:
                slot.lease = -1

    def deliver(self, lease: int, result: Any, reward: float | None, oldest: int) -> bool:
        """An attempt is over -> whether it is the attempt's one result, now or from an earlier delivery under this lease.

        oldest: the oldest version of its tokens. Raises ScheduleError for tokens older than the lease, or of no version yet.
        """
        found = [(group, slot) for group in self.open_groups.values() for slot in group.slots if slot.lease == lease]
        if not found:  # given up; or out of the buffer already, of which the worker need not know
            return False
        ((group, slot),) = found
        if slot.delivered:
            return True
        if not slot.version <= oldest <= self.version:
            raise ScheduleError(
                f"lease {lease}: a token of version {oldest}; wanted {slot.version}, its weights', to {self.version}"
            )
        if reward is None:
            slot.failures += 1
            if slot.failures < TRIES:
                slot.lease = -1
                return True
        slot.delivered, slot.result, slot.reward = True, result, reward
        if group.whole and (group.failed or (self.rounds > 1 and group.flat)):
            self.aside.append(self.open_groups.pop(group.number))
        return True

    def leases(self, worker: str | None = None) -> list[int]:
        """Of attempts under way, by one worker or by all."""
        return [s.lease for s in self._slots() if s.lease >= 0 and not s.delivered and worker in (None, s.worker)]

    def _slots(self) -> Iterable[Slot]:
        return (slot for group in self.open_groups.values() for slot in group.slots)

    # ---------------------------------------------------------------------------------------------------------- trainer

    @property
    def due(self) -> list[Group] | None:
        """The groups of the next step; None while it has to wait for the step under way or for attempts."""
        whole = [group for group in self.open_groups.values() if group.whole]
        chosen = sorted(whole, key=lambda group: (group.oldest, group.number))[: self.groups]
        wanted = min(self.groups, self.rounds * self.groups - len(self.aside))
        if self.version < self.step or len(chosen) < wanted or not self._in_time(chosen):
            return None
        return chosen

    def _in_time(self, chosen: list[Group]) -> bool:
        """Whether a step on these leaves no more groups than later steps can take before each of them is too old."""
        taken = {group.number for group in chosen}
        left = sorted(group.oldest for group in self.open_groups.values() if group.number not in taken)
        # So many must be gone when the weights have done oldest + max_staleness steps, from step + 1 on.
        return all(
            count <= (oldest + self.max_staleness - self.step) * self.groups
            for count, oldest in enumerate(left, 1)
            if oldest < math.inf
        )

    def take(self) -> Batch:
        """The batch of the next step, which is out of the buffer then. Raises ScheduleError if none is due."""
        chosen = self.due
        if chosen is None:
            raise ScheduleError(f"step {self.step + 1} is not due")
        for group in chosen:
            del self.open_groups[group.number]
        batch = Batch(chosen, self.aside)
        self.aside, self.step = [], self.step + 1
        self.taken[self.step] = batch
        return batch

    def publish(self) -> None:
        """The step under way is done: its weights are what workers sample with from now on."""
        if self.version == self.step:
            raise ScheduleError(f"version {self.version} is published already")
        self.version = self.step

    # ------------------------------------------------------------------------------------------------------ persistence

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            **{key: getattr(self, key) for key in ("version", "step", "opened", "leased")},
            "open_groups": [asdict(group) for group in self.open_groups.values()],
            "aside": [asdict(group) for group in self.aside],
            "taken": [[step, asdict(batch)] for step, batch in self.taken.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("version", "step", "opened", "leased"):
            setattr(self, key, state[key])
        self.open_groups = {group["number"]: _group(group) for group in state["open_groups"]}
        self.aside = list(map(_group, state["aside"]))
        self.taken = {
            step: Batch(list(map(_group, batch["groups"])), list(map(_group, batch["aside"]))) for step, batch in state["taken"]
        }

    def forget(self, step: int) -> None:
        """The trainer has done this step, and what comes back from before it has a journal."""
        self.taken = {number: batch for number, batch in self.taken.items() if number > step}


def _group(state: dict[str, Any]) -> Group:
    return Group(state["number"], state["order"], [Slot(**slot) for slot in state["slots"]])
