"""The largest micro-batches that can come, forward and backward, before the first step: out of memory now, or not at all.

Elsewhere runs end hours later, with the first sample that is as long as allowed (huggingface/trl#2688, unslothai/unsloth#1624).
"""

import math
import time
from typing import NamedTuple

import torch

from minglm.rl.learner import PolicyLearner
from minglm.rl.rows import Rows


class OutOfMemory(RuntimeError):
    """The largest micro-batch does not fit. The message says how large it is, and which keys make it smaller."""


class Rehearsed(NamedTuple):
    """shapes: (rows, tokens) of the micro-batches; peak_bytes: of a GPU's memory, None on a CPU."""

    shapes: list[tuple[int, int]]
    seconds: float
    peak_bytes: int | None

    def __str__(self) -> str:
        shapes = ", ".join(f"{rows:,} x {tokens:,} tokens" for rows, tokens in self.shapes)
        peak = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**30:.1f} GiB at most"
        return f"{shapes}, forward and backward in {self.seconds:.1f} s{peak}"


def largest_shapes(longest: int, tokens_at_once: int, most_rows: int) -> list[tuple[int, int]]:
    """(rows, tokens) of the micro-batches that no other one exceeds, neither in tokens nor in pairs of tokens, which attention
    may hold: that with the longest sample, of `longest` ids, and, where shorter ones fill it better, the fullest ones. The
    last id of a sample is predicted and not read."""
    rows = min(most_rows, max(1, tokens_at_once // longest))
    # With more than twice the rows, a token of each is not read, which is more than what rounding down can lose before.
    shorter = [(b, tokens_at_once // b - 1) for b in range(rows + 1, min(most_rows, 2 * rows + 1) + 1)]
    found = [(rows, longest - 1)]
    for measure in (lambda shape: shape[0] * shape[1] ** 2, math.prod):
        largest = max(shorter, key=measure, default=(0, 0))
        if measure(largest) > max(map(measure, found)):
            found.append(largest)
    return found


def rehearse(learner: PolicyLearner, longest: int, most_rows: int) -> Rehearsed:
    """Take the largest micro-batches of at most `most_rows` samples of at most `longest` ids through all that a step does with
    one, beside the optimisers' state, which takes memory from the first step on. Weights, optimisers and random generators stay
    as they are, to the bit, and gradients as they were before a step: there are none.

    Raises OutOfMemory. (Where the system kills a process that takes too much, as Linux may, it is killed here.)
    """
    device = learner.device.torch_device
    shapes = largest_shapes(longest, learner.tokens_at_once, most_rows)
    models = [learner.model] if learner.critic is None else [learner.model, learner.critic]
    loads = [model.expert_load.clone() for model in models]
    optimizers = [one for one in (learner.optimizer, learner.critic_optimizer) if one is not None]
    fresh = [optimizer for optimizer in optimizers if not optimizer.state]
    start, b, t = time.perf_counter(), 0, 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for optimizer in fresh:
            optimizer.prepare()  # its state takes memory from the first step on
        for b, t in shapes:
            _micro_batch(learner, b, t)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is the latter, on a CPU by its words alone
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"out of memory with {b:,} x {t:,} tokens, the largest micro-batch that can come: {str(error).splitlines()[0]}. "
            "Lower sampling.context, which bounds the longest sample, or tokens_at_once, or set "
            "hardware.activation_checkpointing = true"
        ) from error
    finally:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for optimizer in fresh:
            optimizer.state.clear()
        for model, load in zip(models, loads, strict=True):
            model.expert_load.copy_(load)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Rehearsed(shapes, time.perf_counter() - start, peak)


def _micro_batch(learner: PolicyLearner, b: int, t: int) -> None:
    """b rows of t tokens, all of the policy's own choice: the head has most to do then."""
    device = learner.device.torch_device
    ids = torch.arange(b * (t + 1), device=device).view(b, t + 1) % learner.model.config.vocab_size
    own = torch.ones(b, t, dtype=torch.bool, device=device)
    zeros = torch.zeros(b, t, device=device)
    rows = Rows(ids[:, :-1], ids[:, 1:], zeros.int(), own, zeros, zeros + 1, zeros.long())
    if learner.routing_replay == "R3":
        with torch.no_grad():
            rows = rows._replace(experts=learner.model.hidden_and_experts(rows.input_ids)[1])
    learner.rehearse(rows)
