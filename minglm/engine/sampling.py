"""How the next token is drawn: parameters of a request, the distribution that they make of logits, and the draws.

A draw depends on the request's seed and on the token's position, and on nothing else: the same request gives the same text
alone and in any company.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# What a uniform number is for. At one position each purpose has a number of its own.
DRAW, DRAFT, ACCEPT, RESIDUAL = range(4)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is answered. Raises ValueError for a value out of its range.

    temperature: divides the logits; 0 takes the likeliest token. Then, in this order: top_k keeps the k likeliest; top_p
    the likeliest that together have this probability; min_p those with at least this share of the likeliest's probability.
    Equally likely tokens are kept or dropped together. seed: None draws one. stop_ids end the answer beside the tokenizer's
    own end-of-turn ids; stop: strings that do; ignore_stop: neither does. logprobs: None: none; 0: the chosen token's; n:
    also those of the n best. at_temperature: these are of the distribution that the temperature makes, and not of the model
    itself. return_experts: which experts each token went to. thinking_budget: after so many tokens of thinking the next one is
    `</think>`. must_think: a thinking that the prompt has opened has a token, at least. grammar: the text that
    `minglm.chat.tool_grammar` makes.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    at_temperature: bool = False
    return_experts: bool = False
    thinking_budget: int | None = None
    must_think: bool = False
    grammar: str | None = None
    ignore_stop: bool = False

    def __post_init__(self):
        wanted = {
            f"temperature = {self.temperature}: wanted 0 or more": 0 <= self.temperature < float("inf"),
            f"top_k = {self.top_k}: wanted 1 or more, or None": self.top_k is None or self.top_k >= 1,
            f"top_p = {self.top_p}: wanted above 0, up to 1": 0 < self.top_p <= 1,
            f"min_p = {self.min_p}: wanted 0 or more, below 1": 0 <= self.min_p < 1,
            f"max_tokens = {self.max_tokens}: wanted 1 or more": self.max_tokens >= 1,
            f"logprobs = {self.logprobs}: wanted 0 or more, or None": self.logprobs is None or self.logprobs >= 0,
            f"at_temperature with temperature = {self.temperature}: wanted above 0": not self.at_temperature
            or self.temperature > 0,
            f"thinking_budget = {self.thinking_budget}: wanted 0 or more, or None": self.thinking_budget is None
            or self.thinking_budget >= 0,
            f"stop = {self.stop!r}: wanted strings that are not empty, in a tuple": isinstance(self.stop, tuple)
            and all(isinstance(stop, str) and stop for stop in self.stop),
        }
        for complaint, holds in wanted.items():
            if not holds:
                raise ValueError(complaint)


class Settings(NamedTuple):
    """The parameters of a batch's rows side by side, each (rows, 1) fp32; None where no row wants it."""

    greedy: bool  # all rows take the likeliest token
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def of(cls, rows: list[SamplingParams], vocab_size: int, device: torch.device) -> "Settings":
        if all(row.temperature == 0 for row in rows):
            return cls(True, None, None, None, None)

        def column(values: list[float], neutral: float) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        return cls(
            False,
            column([row.temperature for row in rows], 1.0),
            column([float(min(row.top_k or vocab_size, vocab_size)) for row in rows], float(vocab_size)),
            column([row.top_p for row in rows], 1.0),
            column([row.min_p for row in rows], 0.0),
        )

    def repeat(self, counts: Tensor) -> "Settings":
        """Row i counts[i] times."""
        return Settings(self.greedy, *(x if x is None else x.repeat_interleave(counts, 0) for x in self[1:]))

    def take(self, rows: slice | Tensor) -> "Settings":
        return Settings(self.greedy, *(x if x is None else x[rows] for x in self[1:]))


def distribution(logits: Tensor, settings: Settings) -> Tensor:
    """What the rows are drawn from: logits (rows, v), -inf where a token is not allowed -> probabilities (rows, v), fp32."""
    if settings.greedy:
        return _one_hot(logits)
    scaled = logits.float()
    if settings.temperature is not None:
        # The largest logit becomes 0 first: a tiny temperature must not overflow.
        scaled = (scaled - scaled.amax(-1, keepdim=True)) / settings.temperature.clamp(min=1e-6)
    if settings.top_k is not None or settings.top_p is not None:
        scaled = _nucleus(scaled, settings.top_k, settings.top_p)
    if settings.min_p is not None:
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + settings.min_p.log(), float("-inf"))
    probabilities = scaled.softmax(-1)
    if settings.temperature is not None:
        probabilities = torch.where(settings.temperature == 0, _one_hot(logits), probabilities)
    return probabilities


def likeliest(logits: Tensor) -> list[int]:
    """The id of each row's largest logit, (rows, v). For this numpy takes a tenth of PyTorch's time on a CPU."""
    in_numpy = logits.device.type == "cpu" and logits.dtype == torch.float32
    return (logits.numpy() if in_numpy else logits).argmax(-1).tolist()


def _one_hot(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _nucleus(scaled: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Hide all but the likeliest: the last rank that stays gives the logit that a token must reach."""
    ordered = scaled.sort(-1, descending=True).values
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    stays = torch.ones_like(ordered, dtype=torch.bool) if top_k is None else ranks < top_k
    if top_p is not None:
        probability = ordered.masked_fill(~stays, float("-inf")).softmax(-1)
        likelier = probability.cumsum(-1, dtype=torch.float64) - probability  # of all tokens before: 0 for the first
        stays = stays & (likelier < top_p)
    last = stays.sum(-1, keepdim=True).clamp(min=1).expand(len(ordered), 1) - 1  # one row of settings may be for all
    return scaled.masked_fill(scaled < ordered.gather(-1, last), float("-inf"))


def draw(probabilities: Tensor, uniform: np.ndarray) -> Tensor:
    """One token for each row by the inverse of its cumulative distribution: (rows, v), and uniform (rows,) float64 in [0, 1)
    -> (rows,) int64. The rows need not sum to 1. A token of probability 0 is never drawn."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = torch.from_numpy(uniform).to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def uniforms(seeds: list[int], positions: list[int], purpose: int | list[int]) -> np.ndarray:
    """A number in [0, 1) for each (seed, position, purpose): (rows,) float64; one purpose for all, or one each.

    Counter-based: SplitMix64 over a mix of the three (Steele et al., 2014), so that no draw waits for another."""
    with np.errstate(over="ignore"):
        x = _mix(np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        counter = np.array(positions, dtype=np.uint64) * np.uint64(4) + np.array(purpose, dtype=np.uint64)
        x = _mix(x + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
