"""What the exact gear costs on this machine, and what it is good for: the gap between engine and trainer without it.

A gap of 0 in the exact gear is the promise kept. Elsewhere than on the CPUs it was tried on, look at it before trusting it.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minglm import ops
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.model import GLM

GEARS = ("torch", "exact")


class Gap(NamedTuple):
    """Absolute differences of log-probabilities, in nats, over that many sampled tokens."""

    largest: float
    mean: float
    tokens: int


class Cost(NamedTuple):
    """Median seconds of the same work in the default gear and in the exact one."""

    work: str
    fast: float
    exact: float

    @property
    def ratio(self) -> float:
        return self.exact / self.fast


def trainers_log_probs(model: GLM, ids: list[int]) -> Tensor:
    """Log-probability of each token but the first, (len(ids) - 1,) fp32, from one pass over the whole sequence."""
    row = torch.tensor(ids, device=model.lm_head.weight.device)
    hidden = model(row[None]).hidden_states[0]
    return ops.token_log_probs(hidden[:-1], model.lm_head.weight, row[1:])


@torch.no_grad()
def measure_gap(model: GLM, gear: str, sequences: int = 8, prompt_tokens: int = 64, new_tokens: int = 64) -> Gap:
    """Sample sequences together with an engine in `gear`; compare its log-probabilities with the trainer's in that gear."""
    engine = Engine(model, None, gear=gear)
    completions = engine.generate(_prompts(model, sequences, prompt_tokens), _parameters(sequences, new_tokens))
    with ops.using(gear):
        wanted = [trainers_log_probs(model, c.prompt_ids + c.ids)[-new_tokens:].cpu() for c in completions]
    difference = (torch.tensor([c.logprobs for c in completions]) - torch.stack(wanted)).abs()
    return Gap(difference.max().item(), difference.mean().item(), difference.numel())


@torch.no_grad()
def measure_cost(model: GLM, repeats: int = 5, new_tokens: int = 32) -> list[Cost]:
    """A pass over 8 x 256 tokens, and engines that answer 1 and 32 prompts; the gears take turns."""
    ids = torch.tensor(_prompts(model, 8, 256), device=model.lm_head.weight.device)
    engines = {gear: Engine(model, None, gear=gear) for gear in GEARS}

    def answer(gear: str, sequences: int) -> None:
        engines[gear].generate(_prompts(model, sequences, 16), _parameters(sequences, new_tokens))

    def forward(gear: str) -> None:
        with ops.using(gear):
            model(ids).logits.sum().item()  # waits for the device

    works = {
        "a pass over 8 x 256 tokens": forward,
        f"1 prompt, {new_tokens} new tokens": lambda gear: answer(gear, 1),
        f"32 prompts, {new_tokens} new tokens each": lambda gear: answer(gear, 32),
    }
    return [Cost(work, *_medians(run, repeats)) for work, run in works.items()]


def report(model: GLM) -> str:
    """Lines for a terminal: gaps and costs of `model`."""
    lines = ["Log-probabilities of sampled tokens, engine against one pass of the trainer:"]
    for gear in GEARS:
        gap = measure_gap(model, gear)
        lines.append(f"  gear {gear:6} largest gap {gap.largest:.2e}, mean {gap.mean:.2e} nats ({gap.tokens} tokens)")
    lines.append("What the exact gear costs:")
    for cost in measure_cost(model):
        lines.append(f"  {cost.work:34} {cost.fast:8.3f} s, exact {cost.exact:8.3f} s: {cost.ratio:.2f} times as long")
    return "\n".join(lines)


def _prompts(model: GLM, sequences: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (sequences, length), generator=generator).tolist()


def _parameters(sequences: int, new_tokens: int) -> list[SamplingParams]:
    return [SamplingParams(seed=i, max_tokens=new_tokens, logprobs=0, ignore_stop=True) for i in range(sequences)]


def _medians(run: Callable[[str], None], repeats: int) -> list[float]:
    """Median seconds of `run(gear)` in each gear."""
    seconds = {gear: [] for gear in GEARS}
    for repeat in range(repeats + 1):
        for gear in GEARS:
            start = time.perf_counter()
            run(gear)
            if repeat > 0:  # the first warms up
                seconds[gear].append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds.values()]
