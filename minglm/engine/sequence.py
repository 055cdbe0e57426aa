"""A request on its way through the engine: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from minglm.engine.constraints import Constraint
from minglm.engine.sampling import SamplingParams
from minglm.engine.text import TextStream


@dataclass(eq=False)
class Sequence:
    """`ids` are prompt and answer. The first `computed` of them have keys and values in the blocks of `blocks`."""

    request_id: int
    ids: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    text: TextStream
    constraint: Constraint | None = None

    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the blocks that the prefix cache knows
    computed: int = 0
    drafted: int = 1  # tokens whose entry the MTP layer's cache has; position 0 has none
    row: int = -1  # in the runner's block table while running

    finish_reason: str | None = None
    stop_reason: str | int | None = None
    experts_seen: int = 0  # positions whose experts have been reported

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens without keys and values: one while decoding, more in a prefill."""
        return len(self.ids) - self.computed

    def restart(self) -> None:
        """All that was computed is given up; the tokens stay."""
        self.blocks, self.digests, self.computed, self.drafted, self.row = [], [], 0, 1, -1


@dataclass
class RequestOutput:
    """What one step added to a request. ids end with the stop id, if one ended it; `text` does not show it.

    text: newly finished text: whole characters only, held back where a stop string could begin. logprobs: of each new id
    under the model itself (nothing cut off; temperature 1, unless the request wants them at its own), natural logarithm;
    top_logprobs: for each new id the best n (id, logprob), best first; experts: int64 (positions, MoE layers, K) of the
    positions computed since the last output, the prompt's first; all None unless asked for. finish_reason: None while it goes
    on, "stop", "length" or "cancelled"; stop_reason: the stop id or string.
    """

    request_id: int
    new_ids: list[int]
    text: str
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    experts: torch.Tensor | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class Completion:
    """A whole answer; fields as in `RequestOutput`. experts: (len(prompt_ids) + len(ids) - 1, MoE layers, K): the last token
    was never fed to the model."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    experts: torch.Tensor | None
    finish_reason: str
    stop_reason: str | int | None = None
