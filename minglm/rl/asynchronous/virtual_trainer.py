"""The asynchronous loop on a virtual clock: real samples and real steps in one process, on a schedule that a seed draws.

A worker's attempt is sampled when it is handed out, with the weights of that moment, and arrives when the schedule says: so
the staleness is real, and the run is the same to the bit every time. What it leaves out are turns that go on over a change of
weights. A run that was killed and goes on meets other durations than the undisturbed one.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from minglm.rl.asynchronous.buffer import Batch, Lease
from minglm.rl.asynchronous.messages import Order, Result, Span
from minglm.rl.asynchronous.timeline import write_spans
from minglm.rl.asynchronous.trainer import BufferedLoop
from minglm.rl.asynchronous.virtual import Durations, Sampled, VirtualClock, VirtualWorker

DURATIONS = Durations()


class VirtualLoop(BufferedLoop):
    """Virtual workers draw on the loop's own engine, which has the published weights until the step is done."""

    def __init__(self, recipe, folder, tokenizer, config, device, base, checkpoint):
        self.clock = VirtualClock()
        super().__init__(recipe, folder, tokenizer, config, device, base, checkpoint)
        own = recipe.asynchronous
        for worker in {slot.worker for group in self.buffer.open_groups.values() for slot in group.slots}:
            self.exchange.lost(worker)  # with the process that played it
        shared = DURATIONS, self.clock, lambda: self.exchange, self.sample, recipe.seed, self.record
        self.workers = [VirtualWorker(f"worker-{number}", own.room, *shared) for number in range(own.workers)]

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, span: Span) -> None:
        write_spans([span], self.timeline)

    def sample(self, leases: Sequence[Lease]) -> list[Sampled]:
        asked = [Order(**lease.order).asked(lease.attempt, self.limits) for lease in leases]
        results = map(Result.of, self.rollouts.collect(asked))
        return [
            Sampled(one.model_dump(), one.reward, one.oldest(lease.version)) for one, lease in zip(results, leases, strict=True)
        ]

    def wait_for(self, step: int) -> Batch:
        """With what happens while the step is under way, for its weights come after that. A step done again happened before."""
        again = step in self.buffer.taken
        while (batch := self.exchange.take(step)) is None:
            self.clock.step()
        self.recorder.now("training")
        if not again:
            self.clock.advance(DURATIONS.training)
        return batch
