"""The inference engine: requests in, tokens out, one step at a time.

A step: the scheduler chooses sequences and tokens, the MTP layer drafts (speculative decoding), the model computes all
tokens in one pass, and every sequence that has reached its end gets its next token, or several where drafts hold. Single-
threaded: whoever serves many clients runs it in one thread of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minglm import ops
from minglm.engine import speculative
from minglm.engine.blocks import BlockManager
from minglm.engine.cache import PagedCache
from minglm.engine.compiled import CompiledModel
from minglm.engine.constraints import Constraint, MustThink, ThinkingBudget
from minglm.engine.grammar import GrammarCompiler
from minglm.engine.sampling import DRAW, SamplingParams, Settings, distribution, draw, likeliest, uniforms
from minglm.engine.scheduler import Scheduled, Scheduler
from minglm.engine.sequence import Completion, RequestOutput, Sequence
from minglm.engine.text import TextStream
from minglm.model import GLM
from minglm.tokenizer import Tokenizer


@dataclass
class EngineStats:
    """running and waiting: requests; free_blocks of num_blocks; the rest counts since the engine began: steps, tokens of
    prompts and of answers, prompt tokens found in the prefix cache, preemptions, and of draft 1, 2, ... how many were made
    and how many accepted."""

    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


class Engine:
    """Answers requests with `model`, all at once.

    tokenizer: None leaves texts empty and knows no end-of-turn ids. block_size: tokens a cache block; num_blocks: None
    takes as many as `max_running` sequences of full length need, at most `DEFAULT_CACHE_BYTES`. max_batch_tokens: tokens
    computed in one step; max_running: sequences at a time. draft_tokens: drafts of the MTP layer a step, 0 for plain
    decoding. gear: of `minglm.ops`; "exact" gives a token's log-probability the same bits in any company. dtype: of the
    cache, by default that of the weights. Raises ValueError for drafts without an MTP layer and for sizes below 1.
    """

    DEFAULT_CACHE_BYTES = 2 * 2**30

    def __init__(
        self,
        model: GLM,
        tokenizer: Tokenizer | None,
        *,
        block_size: int = 16,
        num_blocks: int | None = None,
        max_batch_tokens: int = 2048,
        max_running: int = 64,
        draft_tokens: int = 0,
        gear: str = "torch",
        dtype: torch.dtype | None = None,
    ):
        if draft_tokens and model.mtp is None:
            raise ValueError(f"draft_tokens = {draft_tokens}, but this model has no MTP layer: wanted 0")
        sizes = {"block_size": block_size, "max_batch_tokens": max_batch_tokens, "max_running": max_running}
        for name, value in {**sizes, "num_blocks": 1 if num_blocks is None else num_blocks}.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: wanted 1 or more")
        self.model, self.tokenizer, self.draft_tokens = model, tokenizer, draft_tokens
        self.gear = "inference" if gear == "torch" else gear
        config, weight = model.config, model.lm_head.weight
        self.device, dtype = weight.device, dtype or weight.dtype
        self.vocab_size = min(config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size)
        layers = model.mtp.layer.index + 1 if draft_tokens else config.num_hidden_layers
        if num_blocks is None:
            each = PagedCache.bytes_of_block(config, layers, block_size, dtype, draft_tokens > 0)
            longest = -(-config.max_position_embeddings // block_size)
            num_blocks = max(1, min(max_running * longest, self.DEFAULT_CACHE_BYTES // each))
        self.cache = PagedCache(
            config, layers, num_blocks, block_size, max_running, self.device, dtype, with_mtp=draft_tokens > 0
        )
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, max_batch_tokens, max_running, draft_tokens)
        self.grammars = GrammarCompiler(tokenizer)
        self.runner = CompiledModel(model) if self.gear == "inference" else model
        self.drafter = None
        if draft_tokens:
            self.drafter = speculative.Drafter(self.runner, self.cache, self.vocab_size, weight.dtype)
        self.weights_version = 0
        self._sequences: dict[int, Sequence] = {}
        self._cancelled: list[RequestOutput] = []
        self._next_id = 0
        self._counts = EngineStats(0, 0, 0, 0, drafted=[0] * draft_tokens, accepted=[0] * draft_tokens)

    # ------------------------------------------------------------------------------------------------------- requests

    def add(self, prompt_ids: list[int], params: SamplingParams) -> int:
        """Queue a request -> its id. Raises ValueError for what can never run: no prompt, ids outside the vocabulary, more
        tokens than the model's positions or the cache hold, a grammar that does not compile, or a text option without a
        tokenizer."""
        self._check(prompt_ids, params)
        stop_ids = frozenset()
        if not params.ignore_stop:
            stop_ids = frozenset(params.stop_ids) | frozenset(self.tokenizer.end_of_turn_ids if self.tokenizer else ())
        seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
        text = TextStream(self.tokenizer, () if params.ignore_stop else params.stop)
        sequence = Sequence(
            self._next_id, list(prompt_ids), len(prompt_ids), params, seed, stop_ids, text, self._constraint(prompt_ids, params)
        )
        self._next_id += 1
        self._sequences[sequence.request_id] = sequence
        self.scheduler.waiting.append(sequence)
        self._counts.prompt_tokens += len(prompt_ids)
        return sequence.request_id

    def _check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ValueError("the prompt is empty: wanted one token at least")
        if not all(isinstance(id, int) and 0 <= id < self.model.config.vocab_size for id in prompt_ids):
            wrong = next(id for id in prompt_ids if not (isinstance(id, int) and 0 <= id < self.model.config.vocab_size))
            raise ValueError(f"the prompt holds id {wrong!r}: wanted 0 to {self.model.config.vocab_size - 1}, the vocabulary")
        # The last token of an answer is never fed.
        tokens, positions = len(prompt_ids) + params.max_tokens - 1, self.model.config.max_position_embeddings
        if tokens > positions:
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens and max_tokens = {params.max_tokens} need {tokens} positions: the model has "
                f"{positions}; shorten the prompt or ask for fewer tokens"
            )
        capacity = len(self.blocks.users) * self.blocks.block_size
        if tokens > capacity:
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens and max_tokens = {params.max_tokens} need {tokens} places in the cache, "
                f"which holds {capacity}; shorten the prompt, ask for fewer tokens, or give the engine more blocks"
            )
        needs_tokenizer = {
            "stop": params.stop,
            "thinking_budget": params.thinking_budget is not None,
            "must_think": params.must_think,
            "grammar": params.grammar,
        }
        if self.tokenizer is None and any(needs_tokenizer.values()):
            raise ValueError(
                f"{[name for name, used in needs_tokenizer.items() if used]} need a tokenizer: the engine has none"
            )

    def _constraint(self, prompt_ids: list[int], params: SamplingParams) -> Constraint | None:
        thinking = matcher = must_think = None
        if params.must_think:
            must_think = MustThink(prompt_ids, self.tokenizer.special_ids)
        if params.thinking_budget is not None:
            thinking = ThinkingBudget(params.thinking_budget, prompt_ids, self.tokenizer.special_ids)
        if params.grammar is not None:
            matcher = self.grammars.matcher(params.grammar)
        return Constraint(thinking, matcher, must_think) if thinking or matcher or must_think else None

    def cancel(self, request_id: int) -> None:
        """End a request now; the next step reports it with finish_reason "cancelled". Unknown and finished ones: nothing."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self._cancelled.append(RequestOutput(request_id, [], sequence.text.finish(), finish_reason="cancelled"))

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._cancelled)

    @property
    def stats(self) -> EngineStats:
        """A copy, true at this moment."""
        return replace(
            self._counts,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            free_blocks=len(self.blocks.free),
            num_blocks=len(self.blocks.users),
            prefix_hit_tokens=self.scheduler.prefix_hits,
            preemptions=self.scheduler.preemptions,
            drafted=list(self._counts.drafted),
            accepted=list(self._counts.accepted),
        )

    def check_invariants(self) -> None:
        """Raises AssertionError if a block is leaked or used twice, or a request is lost."""
        self.scheduler.check()
        known = {s.request_id for s in (*self.scheduler.running, *self.scheduler.waiting)}
        assert known == self._sequences.keys(), f"requests {sorted(known ^ self._sequences.keys())} are lost"

    def generate(
        self,
        prompts: list[list[int]] | list[str],
        params: SamplingParams | list[SamplingParams],
        progress: bool = False,
    ) -> list[Completion]:
        """Answer all prompts (ids, or texts without special tokens), in order. params: one for all, or one each. progress:
        draw a bar on stderr. Other requests in the engine go on, and their outputs are lost: use `step` for them."""
        params = params if isinstance(params, list) else [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} params for {len(prompts)} prompts: wanted one for all, or one each")
        ids = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        outputs: dict[int, list[RequestOutput]] = {}
        try:
            for prompt_ids, own in zip(ids, params, strict=True):
                outputs[self.add(prompt_ids, own)] = []
            with tqdm(total=len(prompts), disable=not progress, desc="generate", unit="answer") as bar:
                while self._sequences.keys() & outputs.keys():
                    for output in self.step():
                        if output.request_id in outputs:
                            outputs[output.request_id].append(output)
                            bar.update(output.finish_reason is not None)
        finally:
            for request_id in outputs:
                self.cancel(request_id)
        return [_join(prompt_ids, parts) for prompt_ids, parts in zip(ids, outputs.values(), strict=True)]

    @torch.no_grad()
    def update_weights(self, weights: Mapping[str, Tensor] | str | Path) -> None:
        """Take new weights: a state of `model.state_dict()`'s names, or a folder. Requests in flight keep their tokens and
        are computed again under the new weights; known prefixes are forgotten. Raises ValueError, before anything has
        changed, for names that are missing or unknown and shapes that differ."""
        if isinstance(weights, str | Path):
            weights = GLM.from_pretrained(weights, device=self.device).state_dict()
        state = self.model.state_dict()
        wrong = sorted(weights.keys() ^ state.keys())
        wrong += [name for name in weights.keys() & state.keys() if weights[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"weights are missing, unknown or of another shape: {wrong}; wanted those of model.state_dict()")
        for name, value in state.items():
            value.copy_(weights[name])
        self.weights_changed()

    def weights_changed(self) -> None:
        """Somebody else has changed the model's weights in place, as a step of training does: forget what was computed with
        the old ones. What is in flight keeps its tokens."""
        for sequence in list(self.scheduler.running)[::-1]:
            self.scheduler.preempt(sequence)
        self.blocks.forget_prefixes()
        self.weights_version += 1

    # ----------------------------------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One iteration: -> what it added to each request that got on. Empty when there is no work."""
        outputs, self._cancelled = self._cancelled, []
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return outputs
        for sequence, *_ in scheduled:
            self.cache.table[sequence.row, : len(sequence.blocks)] = sequence.blocks
        with ops.using(self.gear):
            proposals = self.drafter.propose(scheduled) if any(item.drafts for item in scheduled) else None
            outputs += self._compute(scheduled, proposals)
        self._counts.steps += 1
        return outputs

    def _compute(self, scheduled: list[Scheduled], proposals: speculative.Proposals | None) -> list[RequestOutput]:
        """The pass of the model over all scheduled tokens, and what follows from it."""
        rows, starts = [item.sequence.row for item in scheduled], [item.start for item in scheduled]
        view = self.cache.view(rows, starts, [item.count for item in scheduled])
        scheduled, ends = [scheduled[i] for i in view.order], view.ends.tolist()
        ids = []
        for sequence, count, drafts, start in scheduled:
            ids += sequence.ids[start : start + count]
            if drafts:
                ids += proposals.drafts[sequence.request_id]
        hidden, experts = self.runner.step(torch.tensor([ids], device=self.device), view)
        if self.cache.hidden is not None:
            self.cache.hidden[view.slots] = hidden[0].to(self.cache.hidden.dtype)
            self.drafter.follow(scheduled)

        sampling = [(item, end) for item, end in zip(scheduled, ends, strict=True) if item.samples]
        tokens = {}
        if sampling:
            rows = [row for item, end in sampling for row in range(end - item.drafts, end + 1)]
            logits = self.runner.lm_head(hidden[0] if len(rows) == len(ids) else hidden[0, rows])
            tokens = self._next_tokens([item for item, _ in sampling], logits, proposals)

        outputs = []
        for item, end in zip(scheduled, ends, strict=True):
            new = tokens.get(item.sequence.request_id)
            output = self._advance(item, new)
            if item.sequence.params.return_experts and experts is not None:
                output.experts = self._new_experts(item, experts[:, end + 1 - item.count : end + 1], new is not None)
            if new is not None or output.experts is not None:
                outputs.append(output)
        return outputs

    def _next_tokens(
        self, items: list[Scheduled], logits: Tensor, proposals: speculative.Proposals | None
    ) -> dict[int, "NewTokens"]:
        """Draw what follows: logits (rows, v), for each item its drafts' rows and one more -> by request id."""
        sequences = [item.sequence for item in items]
        allowed = logits[:, : self.vocab_size]
        if any(sequence.constraint for sequence in sequences):
            allowed = allowed.clone()
            self._constrain(items, allowed, proposals)
        settings = Settings.of([sequence.params for sequence in sequences], self.vocab_size, self.device)
        if proposals is not None and any(item.drafts for item in items):
            drawn = speculative.verify(items, allowed, settings, proposals)
        elif settings.greedy:
            drawn = [[id] for id in likeliest(allowed)]
        else:
            uniform = uniforms([s.seed for s in sequences], [len(s.ids) for s in sequences], DRAW)
            drawn = [[id] for id in draw(distribution(allowed, settings), uniform).tolist()]

        tokens, row = {}, 0
        wanted = [sequence.params.logprobs for sequence in sequences]
        logprobs = None
        if any(n is not None for n in wanted):
            rows = [item.sequence.params for item in items for _ in range(item.drafts + 1)]
            divisors = [params.temperature if params.at_temperature else 1.0 for params in rows]
            logprobs = logits.float()
            if any(divisor != 1 for divisor in divisors):
                logprobs = logprobs / torch.tensor(divisors, device=self.device)[:, None]
            logprobs = logprobs.log_softmax(-1)
        for item, ids, best in zip(items, drawn, wanted, strict=True):
            rows = slice(row, row + len(ids))
            tokens[item.sequence.request_id] = NewTokens.of(ids, None if best is None else logprobs[rows], best)
            row += item.drafts + 1
        return tokens

    @staticmethod
    def _constrain(items: list[Scheduled], allowed: Tensor, proposals: speculative.Proposals | None) -> None:
        """Hide what budget and grammar forbid at each row, supposing that the drafts before it hold."""
        row = 0
        for sequence, _, drafts, _ in items:
            if sequence.constraint is not None:
                constraint = sequence.constraint.fork() if drafts else sequence.constraint
                constraint.hide(allowed[row])
                for i in range(drafts):
                    constraint.advance(proposals.drafts[sequence.request_id][i])
                    constraint.hide(allowed[row + i + 1])
            row += drafts + 1

    def _advance(self, item: Scheduled, new: "NewTokens | None") -> RequestOutput:
        """Add the new tokens to their sequence, up to the one that ends it."""
        sequence, count, drafts, _ = item
        output = RequestOutput(sequence.request_id, [], "")
        if new is None:
            sequence.computed += count
            self._remember(sequence)
            return output
        start = len(sequence.ids)
        for id in new.ids:
            sequence.ids.append(id)
            if id in sequence.stop_ids:
                sequence.finish_reason, sequence.stop_reason = "stop", id
                break
            if sequence.constraint is not None:
                sequence.constraint.advance(id)
            output.text += sequence.text.feed(id)
            if sequence.text.stopped_by is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", sequence.text.stopped_by
                break
            if sequence.generated >= sequence.params.max_tokens:
                sequence.finish_reason = "length"
                break
        output.new_ids = sequence.ids[start:]
        if new.logprobs is not None:
            output.logprobs = new.logprobs[: len(output.new_ids)]
            output.top_logprobs = None if new.best is None else new.best[: len(output.new_ids)]
        self._counts.generated_tokens += len(output.new_ids)
        for i in range(drafts):
            self._counts.drafted[i] += 1
            self._counts.accepted[i] += i < len(new.ids) - 1
        # A draft that held was fed already; the last token never was.
        sequence.computed = len(sequence.ids) - 1
        self._remember(sequence)
        if sequence.finish_reason is not None:
            output.text += sequence.text.finish()
            output.finish_reason, output.stop_reason = sequence.finish_reason, sequence.stop_reason
            if output.text and sequence.text.stopped_by is not None and sequence.finish_reason == "length":
                output.finish_reason, output.stop_reason = "stop", sequence.text.stopped_by
            self.scheduler.remove(sequence)
            del self._sequences[sequence.request_id]
        return output

    def _remember(self, sequence: Sequence) -> None:
        self.scheduler.remember(sequence, min(sequence.computed, sequence.drafted) if self.draft_tokens else sequence.computed)

    @staticmethod
    def _new_experts(item: Scheduled, experts: Tensor, sampled: bool) -> Tensor | None:
        """experts (layers, count, K) of the item's tokens -> those of positions not reported before, (positions, layers, K).
        Drafts that did not hold are left out; a sequence that was preempted is computed again and reported once."""
        sequence, start = item.sequence, item.start
        end = len(sequence.ids) - 1 if sampled else start + item.count
        seen, sequence.experts_seen = sequence.experts_seen, max(sequence.experts_seen, end)
        return experts[:, seen - start : end - start].transpose(0, 1).clone() if end > seen else None


@dataclass
class NewTokens:
    """What one step drew for one sequence."""

    ids: list[int]
    logprobs: list[float] | None
    best: list[list[tuple[int, float]]] | None

    @classmethod
    def of(cls, ids: list[int], logprobs: Tensor | None, best: int | None) -> "NewTokens":
        """logprobs (len(ids), v); best: how many of the likeliest, 0 for none but the chosen."""
        if logprobs is None:
            return cls(ids, None, None)
        chosen = logprobs[torch.arange(len(ids)), ids].tolist()
        if not best:
            return cls(ids, chosen, None)
        values, top = logprobs.topk(min(best, logprobs.shape[-1]))
        return cls(ids, chosen, [list(zip(*row, strict=True)) for row in zip(top.tolist(), values.tolist(), strict=True)])


def _join(prompt_ids: list[int], parts: list[RequestOutput]) -> Completion:
    """One answer from the outputs of its steps."""

    def joined(name: str) -> list | None:
        pieces = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        return sum(pieces, []) if pieces else None

    experts = [part.experts for part in parts if part.experts is not None]
    return Completion(
        list(prompt_ids),
        joined("new_ids"),
        "".join(part.text for part in parts),
        joined("logprobs"),
        joined("top_logprobs"),
        torch.cat(experts) if experts else None,
        parts[-1].finish_reason,
        parts[-1].stop_reason,
    )
