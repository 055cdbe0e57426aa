"""The rules of the asynchronous mode under a thousand schedules with kills: each sample once, none too old, none lost."""

import itertools
import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.rl.asynchronous.buffer import TRIES, Buffer, ScheduleError
from minglm.rl.asynchronous.exchange import Exchange, Journal, JournalError, replay
from minglm.rl.asynchronous.virtual import Durations, Sampled, VirtualClock, VirtualWorker

PATIENCE = 50_000  # events, that is twenty minutes of a schedule or more; a dead end would go on for ever


class Run:
    """A trainer on virtual time: checkpoints, kills, and what it has trained on."""

    def __init__(self, size, groups, rounds, max_staleness, workers, room, durations, failures, seed):
        self.clock, self.calls, self.rng = VirtualClock(), [], random.Random(seed)
        self.shape, self.failures, self.durations = (size, groups, rounds, max_staleness), failures, durations
        self.checkpoint = (0, 0, Buffer(*self.shape).state_dict())  # steps done, calls before, the buffer then
        self.step, self.trained, self.exchange = 0, {}, None
        self.begin()
        for number in range(workers):
            VirtualWorker(f"w{number}", room, durations, self.clock, lambda: self.exchange, self.sample, seed)

    def begin(self):
        """As a trainer does that comes back: the checkpoint's buffer, and the journal's calls since."""
        self.step, first, state = self.checkpoint
        buffer = Buffer(*self.shape)
        buffer.load_state_dict(json.loads(json.dumps(state)))
        replay(buffer, json.loads(json.dumps(self.calls[first:])))
        self.exchange = Exchange(buffer, self.calls.extend, lambda version, number: number, self.clock, lease_seconds=3.0)

    def sample(self, leases):
        for lease in leases:
            failed = self.rng.random() < self.failures
            yield Sampled(
                [lease.group, lease.attempt, lease.number], None if failed else self.rng.choice([0, 1]), lease.version
            )

    def die(self, seconds):
        self.exchange = None
        self.clock.advance(seconds)
        self.begin()

    def train(self, steps, kill_rate, checkpoint_every):
        while self.step < steps:
            events = 0
            while (batch := self.exchange.take(self.step + 1)) is None:
                self.clock.step()
                events += 1
                assert events < PATIENCE, "the trainer waits for ever"
            dies = self.rng.random() < kill_rate
            self.clock.advance(self.durations.training * (self.rng.random() if dies else 1))
            if dies:  # in the middle of a step
                self.die(self.rng.choice([0.0, 1.0, 10.0]))
                continue
            self.step += 1
            self.note(batch)
            if self.exchange.buffer.version < self.step:
                self.exchange.publish()
            self.exchange.buffer.forget(self.step)
            if self.step % checkpoint_every == 0:
                self.checkpoint = (self.step, len(self.calls), self.exchange.buffer.state_dict())
            if self.rng.random() < kill_rate:  # between two steps
                self.die(1.0)

    def note(self, batch):
        found = [(group.number, [slot.result for slot in group.slots], group.oldest) for group in batch.groups]
        aside = [(group.number, [slot.result for slot in group.slots]) for group in batch.aside]
        # A step that is done again is the same step.
        assert self.trained.setdefault(self.step, (found, aside)) == (found, aside)


SCHEDULES = st.fixed_dictionaries(
    {
        "size": st.integers(2, 4),
        "groups": st.integers(1, 4),
        "rounds": st.integers(1, 3),
        "max_staleness": st.integers(0, 4),
        "workers": st.integers(1, 4),
        "room": st.integers(1, 12),
        "durations": st.builds(
            Durations,
            episode=st.sampled_from([0.1, 1.0]),
            episode_spread=st.sampled_from([0.0, 1.0, 1.5]),
            training=st.sampled_from([0.1, 1.0, 5.0]),
            weights=st.sampled_from([0.0, 0.5]),
            death=st.sampled_from([math.inf, 20.0, 5.0]),
            silence=st.sampled_from([math.inf, 10.0]),
            silence_length=st.sampled_from([1.0, 5.0]),  # below and above the time of a lease
            lost_replies=st.sampled_from([0.0, 0.3]),
        ),
        "failures": st.sampled_from([0.0, 0.0, 0.2]),
        "seed": st.integers(0, 2**32),
    }
)


@settings(max_examples=1000)
@given(SCHEDULES, st.sampled_from([0.0, 0.2]), st.integers(1, 4))
def test_each_attempt_is_trained_on_once_and_never_too_late_and_nobody_waits_for_ever(schedule, kill_rate, checkpoint_every):
    run = Run(**schedule)
    run.train(steps=6, kill_rate=kill_rate, checkpoint_every=checkpoint_every)
    size, groups, rounds, max_staleness = run.shape
    assert list(run.trained) == list(range(1, 7))
    seen = Counter()
    for step, (trained, aside) in run.trained.items():
        assert len(trained) <= groups
        assert len(trained) >= min(groups, rounds * groups - len(aside))
        for number, results, oldest in trained:
            assert (step - 1) - oldest <= max_staleness
            seen[number] += 1
            assert [result[:2] for result in results] == [[number, attempt] for attempt in range(size)]
        seen.update(number for number, _ in aside)
    # Each group that was ever opened is in one step, or still in the buffer.
    buffer = run.exchange.buffer
    seen.update([*buffer.open_groups, *(group.number for group in buffer.aside)])
    assert seen == Counter(range(buffer.opened))


@settings(max_examples=50)
@given(SCHEDULES)
def test_one_seed_is_one_schedule(schedule):
    first, again = Run(**schedule), Run(**schedule)
    for run in (first, again):
        run.train(steps=4, kill_rate=0.2, checkpoint_every=2)
    assert first.calls == again.calls and first.clock.now == again.clock.now and first.trained == again.trained


def test_with_staleness_zero_workers_wait_while_the_trainer_trains():
    run = Run(2, 2, 1, 0, 2, 8, Durations(training=5.0), 0.0, 1)
    run.train(steps=3, kill_rate=0.0, checkpoint_every=1)
    names = [name for name, _ in run.calls if name in ("open", "take", "publish")]
    assert names == ["open", "open", "take", "publish"] * 3


# ------------------------------------------------------------------------------------------------------------- the rules


def buffer_with(rewards, size=2, groups=1, rounds=1, max_staleness=1):
    """A buffer whose groups have these rewards delivered, in order; each group by one worker."""
    buffer = Buffer(size, groups, rounds, max_staleness)
    for own in rewards:
        buffer.open("problem")
        for reward in own:
            lease = buffer.lease("w")
            buffer.deliver(lease.number, "answer", reward, lease.version)
    return buffer


def test_a_delivery_counts_once_and_not_under_a_lease_that_is_void():
    buffer = Buffer(2, 1, 1, 0)
    buffer.open("problem")
    first = buffer.lease("slow")
    buffer.give_up([first.number])
    second = buffer.lease("fast")
    assert (second.group, second.attempt) == (first.group, first.attempt)
    assert not buffer.deliver(first.number, "late", 1.0, 0)
    assert buffer.deliver(second.number, "good", 1.0, 0) and buffer.deliver(second.number, "again", 0.0, 0)
    assert buffer.open_groups[0].slots[0].result == "good"


def test_tokens_that_are_older_than_the_lease_or_of_the_future_are_refused():
    buffer = buffer_with([(0, 1)])
    buffer.take()
    buffer.publish()
    buffer.open("problem")
    lease = buffer.lease("w")
    for oldest in (0, 2):
        with pytest.raises(ScheduleError, match=f"a token of version {oldest}; wanted 1"):
            buffer.deliver(lease.number, "answer", 1.0, oldest)


def test_groups_without_a_spread_are_replaced_and_handed_over_beside():
    buffer = buffer_with([(1, 1)], rounds=2)
    assert buffer.due is None and buffer.admits
    buffer.open("problem")
    for reward in (0, 1):
        buffer.deliver(buffer.lease("w").number, "answer", reward, 0)
    batch = buffer.take()
    assert [group.number for group in batch.groups] == [1] and [group.number for group in batch.aside] == [0]


def test_with_one_round_a_group_without_a_spread_is_trained_on():
    assert [group.number for group in buffer_with([(1, 1)]).take().groups] == [0]


def test_a_failed_environment_is_tried_again_and_at_last_puts_the_group_aside():
    buffer = Buffer(2, 1, 1, 0)
    buffer.open("problem")
    buffer.deliver(buffer.lease("w").number, "answer", 1.0, 0)
    for _ in range(TRIES):
        lease = buffer.lease("w")
        assert lease.attempt == 1
        buffer.deliver(lease.number, None, None, 0)
    assert buffer.lease("w") is None and [group.number for group in buffer.aside] == [0] and buffer.aside[0].failed


def test_the_trainer_waits_for_a_group_that_would_be_too_old_and_passes_over_one_that_would_not():
    buffer = Buffer(2, 1, 1, 1)
    for _ in range(2):
        buffer.open("problem")
    leases = [buffer.lease("w") for _ in range(4)]
    for lease in leases[2:]:
        buffer.deliver(lease.number, "answer", 0.0, 0)
    assert [group.number for group in buffer.due] == [1]  # group 0 may still be a step old
    buffer.take()
    buffer.publish()
    buffer.open("problem")
    for _ in range(2):
        buffer.deliver(buffer.lease("w").number, "answer", 0.0, 1)
    assert buffer.due is None  # after the next step group 0 would be two steps old
    for lease in leases[:2]:
        buffer.deliver(lease.number, "answer", 0.0, 0)
    assert [group.number for group in buffer.due] == [0]


def test_what_is_not_admitted_not_due_or_published_twice_is_an_error():
    buffer = Buffer(2, 1, 1, 0)
    for call, message in ((buffer.take, "step 1 is not due"), (buffer.publish, "version 0 is published already")):
        with pytest.raises(ScheduleError, match=message):
            call()
    buffer.open("problem")
    with pytest.raises(ScheduleError, match="group 1 is not admitted"):
        buffer.open("problem")


# ----------------------------------------------------------------------------------------------------------- the exchange


def test_a_worker_gets_work_only_with_the_published_weights_and_loses_it_by_silence_or_when_a_reply_was_lost():
    clock, numbers = VirtualClock(), itertools.count()
    exchange = Exchange(Buffer(2, 2, 1, 0), [].extend, lambda version, number: next(numbers), clock, lease_seconds=10.0)
    assert exchange.poll("a", -1, 4, []).leases == []
    first = [lease.number for lease in exchange.poll("a", 0, 4, []).leases]
    assert first == [0, 1, 2, 3] and exchange.poll("b", 0, 4, []).leases == []
    kept = exchange.poll("a", 0, 1, first[:3])  # the lease 3 never arrived
    assert [lease.number for lease in kept.leases] == [4] and kept.void == []
    clock.advance(11.0)
    exchange.give_up_silent()
    assert len(exchange.poll("b", 0, 9, []).leases) == 4
    assert exchange.poll("a", 0, 0, first[:3]).void == first[:3]


def test_a_journal_is_read_from_a_file_on_and_without_a_last_line_that_was_cut_off(tmp_path):
    journal = Journal(tmp_path)
    journal.write([("open", ["x"])])
    second = journal.start()
    journal.write([("lease", ["w"]), ("publish", [])])
    with (tmp_path / f"{second:06d}.jsonl").open("a") as file:
        file.write('["take"')
    again = Journal(tmp_path)
    again.write([("take", [])])
    assert again.read(0) == [("open", ["x"]), ("lease", ["w"]), ("publish", []), ("take", [])]
    assert again.read(second)[0] == ("lease", ["w"])
    again.forget(second)
    assert again.read(0) == again.read(second)
    for line in ("nonsense", "5"):
        (tmp_path / "000009.jsonl").write_text(f"{line}\n")
        with pytest.raises(JournalError, match="000009.jsonl, line 1"):
            again.read(0)
