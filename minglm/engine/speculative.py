"""Speculative decoding: the MTP layer drafts a few tokens, the model checks them all in one pass (report, section 2.1).

The layer predicts, from the trunk's state at t and the token at t + 1, the token at t + 2. For longer drafts it is applied
again to its own normed output. Drafts are *drawn* from the distribution q that the request's settings make of its logits, and
accepted with probability min(1, p / q), where p is the model's own distribution under the same settings; a rejected draft is
replaced by a draw from max(0, p - q), normalised. The answer is then distributed as without drafts (Leviathan et al., arXiv
2211.17192, appendix A.1). At temperature 0 both are certain, and the text is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minglm.engine.cache import PagedCache
from minglm.engine.compiled import CompiledModel
from minglm.engine.sampling import ACCEPT, DRAFT, DRAW, RESIDUAL, Settings, distribution, draw, likeliest, uniforms
from minglm.engine.scheduler import Scheduled
from minglm.engine.sequence import Sequence
from minglm.model import GLM


@dataclass
class Proposals:
    """`drafts` by request id, and for each draft what it was drawn from: (v,) fp32, None where all took the likeliest."""

    drafts: dict[int, list[int]]
    distributions: dict[int, list[Tensor]] | None

    def drawn_from(self, request_id: int, i: int, like: Tensor) -> Tensor:
        """The distribution of draft i, in the form of `like` (v,)."""
        if self.distributions is not None:
            return self.distributions[request_id][i]
        certain = torch.zeros_like(like)
        certain[self.drafts[request_id][i]] = 1.0
        return certain


class Drafter:
    """The MTP layer of `model` at work on the engine's `cache`; ids from `vocab_size` on are never drafted.

    dtype: of the weights.
    """

    def __init__(self, model: GLM | CompiledModel, cache: PagedCache, vocab_size: int, dtype: torch.dtype):
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        self.device, self.dtype = cache.keys.device, dtype

    def propose(self, scheduled: list[Scheduled]) -> Proposals:
        """Draft tokens for the sequences that want some. The layer first catches up with the tokens that were accepted."""
        items = sorted((item for item in scheduled if item.drafts), key=lambda item: -item.drafts)
        sequences = [item.sequence for item in items]
        settings = Settings.of([sequence.params for sequence in sequences], self.vocab_size, self.device)
        hidden = self._catch_up(items, [len(sequence.ids) for sequence in sequences])
        found = Proposals(
            {s.request_id: [] for s in sequences}, None if settings.greedy else {s.request_id: [] for s in sequences}
        )
        constraints = [None if s.constraint is None else s.constraint.fork() for s in sequences]
        for i in range(items[0].drafts):
            active = [item.sequence for item in items if item.drafts > i]  # the first ones: most drafts first
            logits = self.model.lm_head(hidden[: len(active)])[:, : self.vocab_size]
            for row, constraint in zip(logits, constraints, strict=False):
                if constraint is not None:
                    constraint.hide(row)
            if settings.greedy:
                ids = logits.argmax(-1)
            else:
                q = distribution(logits, settings.take(slice(len(active))))
                ids = draw(q, uniforms([s.seed for s in active], [len(s.ids) + i for s in active], DRAFT))
            for row, (id, sequence) in enumerate(zip(ids.tolist(), active, strict=True)):
                found.drafts[sequence.request_id].append(id)
                if found.distributions is not None:
                    found.distributions[sequence.request_id].append(q[row])
                if constraints[row] is not None:
                    constraints[row].advance(id)
            going_on = [item.sequence for item in items if item.drafts > i + 1]
            if going_on:
                hidden = self._again(going_on, hidden, ids, i)
        return found

    def _catch_up(self, items: list[Scheduled], ends: list[int]) -> Tensor:
        """Make the layer's entries for the tokens up to `ends`, and return its states at the last ones (items, h)."""
        sequences = [item.sequence for item in items]
        starts = [sequence.drafted for sequence in sequences]
        view = self.cache.view(
            [s.row for s in sequences], starts, [end - start for start, end in zip(starts, ends, strict=True)], first_key=1
        )
        ids = []
        for i in view.order:
            ids += sequences[i].ids[starts[i] : ends[i]]
            sequences[i].drafted = ends[i]
        before = torch.from_numpy(self.cache.slots(view.token_rows, view.positions - 1)).to(self.device)
        states = self.cache.hidden.index_select(0, before).to(self.dtype)
        hidden = self.model.mtp_step(states[None], torch.tensor([ids], device=self.device), view)
        return hidden[0, view.ends[np.argsort(view.order)]]

    def _again(self, sequences: list[Sequence], hidden: Tensor, ids: Tensor, made: int) -> Tensor:
        """The layer applied to its own output `hidden` and the draft `ids` that it led to, (rows, ...) -> its next states."""
        view = self.cache.view(
            [s.row for s in sequences], [len(s.ids) + made for s in sequences], [1] * len(sequences), first_key=1
        )
        order = torch.from_numpy(view.order).to(self.device)
        hidden = self.model.mtp_step(hidden[order][None], ids[order][None], view)[0]
        return hidden[torch.argsort(order)]

    def follow(self, scheduled: list[Scheduled]) -> None:
        """After the trunk's pass over pieces of prompts: the layer's entries for the same tokens."""
        items = [item for item in scheduled if item.drafts == 0 and item.start + item.count - item.sequence.drafted > 1]
        if items:
            self._catch_up(items, [item.start + item.count for item in items])


def verify(items: list[Scheduled], logits: Tensor, settings: Settings, proposals: Proposals) -> list[list[int]]:
    """The model's verdict: logits (rows, v), for each item the rows of its drafts and one more -> the tokens of each item:
    the drafts that hold and one that the model draws itself."""
    drafts = [proposals.drafts[item.sequence.request_id] if item.drafts else [] for item in items]
    first_rows = np.cumsum([0] + [item.drafts + 1 for item in items])[:-1].tolist()
    if settings.greedy:
        best = likeliest(logits)
        held = [_agree(own, best[row : row + len(own)]) for own, row in zip(drafts, first_rows, strict=True)]
        return [own[:n] + [best[row + n]] for own, n, row in zip(drafts, held, first_rows, strict=True)]

    counts = torch.tensor([item.drafts + 1 for item in items], device=logits.device)
    p = distribution(logits, settings.repeat(counts))
    held = accepted(items, drafts, first_rows, p, proposals)
    last = p[[row + n for row, n in zip(first_rows, held, strict=True)]]  # a copy
    purposes = [RESIDUAL if n < item.drafts else DRAW for item, n in zip(items, held, strict=True)]
    for row, item, n in zip(last, items, held, strict=True):
        if n < item.drafts:
            row.copy_(residual(row, proposals.drawn_from(item.sequence.request_id, n, row)))
    seeds = [item.sequence.seed for item in items]
    positions = [len(item.sequence.ids) + n for item, n in zip(items, held, strict=True)]
    final = draw(last, uniforms(seeds, positions, purposes))
    return [own[:n] + [id] for own, n, id in zip(drafts, held, final.tolist(), strict=True)]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a rejected draft's place is drawn from: p and q (v,) -> max(0, p - q), not normalised."""
    rest = (p - q).clamp_(min=0)
    return torch.where(rest.sum() > 0, rest, p)  # p where rounding alone made them differ


def _agree(drafts: list[int], likeliest: list[int]) -> int:
    """How many drafts, from the first on, are the likeliest token."""
    return next((i for i, (a, b) in enumerate(zip(drafts, likeliest, strict=True)) if a != b), len(drafts))


def accepted(
    items: list[Scheduled], drafts: list[list[int]], first_rows: list[int], p: Tensor, proposals: Proposals
) -> list[int]:
    """How many drafts of each item hold: each with probability min(1, p / q), none after the first that does not."""
    rows = [row + i for own, row in zip(drafts, first_rows, strict=True) for i in range(len(own))]
    ids = torch.tensor([id for own in drafts for id in own], device=p.device)
    q = torch.stack([proposals.drawn_from(item.sequence.request_id, i, p[0]) for item in items for i in range(item.drafts)])
    seeds = [item.sequence.seed for item in items for _ in range(item.drafts)]
    positions = [len(item.sequence.ids) + i for item in items for i in range(item.drafts)]
    uniform = torch.from_numpy(uniforms(seeds, positions, ACCEPT)).to(p.device)
    p_of, q_of = (x.gather(1, ids[:, None])[:, 0] for x in (p[rows], q))
    holds = (uniform * q_of < p_of).tolist()
    held, at = [], 0
    for own in drafts:
        held.append(next((i for i in range(len(own)) if not holds[at + i]), len(own)))
        at += len(own)
    return held
