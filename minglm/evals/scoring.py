"""How likely a model finds given text: the log-probability of each token, of many texts in one pass.

A `Passage` is a prompt and what may follow it. The prompt is computed once, however many continuations it has, and no
token is padding: the passages lie side by side in the engine's paged cache. So a long document with eight possible answers
costs hardly more than one with a single answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minglm import ops
from minglm.engine.cache import CacheView, PagedCache
from minglm.model import GLM
from minglm.tokenizer import Tokenizer


class ScoringError(ValueError):
    """Text that cannot be scored. The message says what was found and wanted."""


@dataclass(frozen=True)
class Passage:
    """prompt: ids, one at least. continuations: ids that may follow, one at least in each. with_prompt: score the prompt's own
    tokens, too."""

    prompt: Sequence[int]
    continuations: tuple[Sequence[int], ...] = ()
    with_prompt: bool = False

    def __post_init__(self):
        if not len(self.prompt) or not all(len(ids) for ids in self.continuations):
            raise ScoringError(
                f"a prompt of {len(self.prompt)} tokens with continuations of {[len(ids) for ids in self.continuations]}: "
                "wanted one token at least in each"
            )

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest continuation."""
        return len(self.prompt) + max(map(len, self.continuations), default=0)

    @property
    def tokens(self) -> int:
        """Places in the cache. A continuation's last token is never fed."""
        return len(self.prompt) + sum(len(ids) - 1 for ids in self.continuations)


@dataclass(frozen=True)
class Scored:
    """Of one text: nats (tokens,) fp64, the negative log-probability of each token; is_best (tokens,) bool, whether it is the
    one that greedy decoding takes."""

    nats: np.ndarray
    is_best: np.ndarray

    @property
    def total(self) -> float:
        return float(self.nats.sum())

    @property
    def exact(self) -> bool:
        """Whether greedy decoding writes this text: each token is the likeliest behind those before it."""
        return bool(self.is_best.all())


@dataclass(frozen=True)
class PassageScores:
    """prompt: of its tokens but the first, which nothing precedes; None unless asked for. continuations: in their order."""

    prompt: Scored | None
    continuations: tuple[Scored, ...]


class Scorer:
    """Scores text under `model`, as it is: in evaluation mode, its config's RoPE base, and no token beyond the tokenizer's.

    batch_tokens: computed in one pass; a passage longer than that has a pass of its own. Positions beyond
    `max_position_embeddings` are allowed: whether a model reaches beyond them is a question to ask.
    """

    def __init__(self, model: GLM, tokenizer: Tokenizer, batch_tokens: int = 8192, progress: bool = False):
        if batch_tokens < 1:
            raise ScoringError(f"batch_tokens = {batch_tokens}: wanted 1 or more")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ScoringError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: wanted the model's own"
            )
        self.model, self.tokenizer, self.batch_tokens, self.progress = model, tokenizer, batch_tokens, progress
        self._cache: PagedCache | None = None

    def score(self, passages: Sequence[Passage], about: str = "score") -> list[PassageScores]:
        """The scores of each passage, in order. The model's mode stays as it is. about: names the progress bar."""
        scores: list[PassageScores | None] = [None] * len(passages)
        was_training = self.model.training
        self.model.eval()
        try:
            with (
                torch.inference_mode(),
                ops.using("inference"),
                tqdm(total=len(passages), desc=about, unit="text", disable=not self.progress, leave=False) as bar,
            ):
                for indices in self._batches(passages):
                    found = self._score_batch([passages[i] for i in indices])
                    for i, one in zip(indices, found, strict=True):
                        scores[i] = one
                    bar.update(len(indices))
        finally:
            self.model.train(was_training)
        return scores

    def _batches(self, passages: Sequence[Passage]) -> Iterator[list[int]]:
        """Passages of like length together: their attention then is one product."""
        batch: list[int] = []
        tokens = 0
        for i in sorted(range(len(passages)), key=lambda i: len(passages[i].prompt)):
            if batch and tokens + passages[i].tokens > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += passages[i].tokens
        if batch:
            yield batch

    def _score_batch(self, passages: list[Passage]) -> list[PassageScores]:
        cache, prompt_rows, rows_of = self._make_room(passages)
        prompts = [list(passage.prompt) for passage in passages]
        hidden = self._run(cache.view(prompt_rows, [0] * len(prompts), [len(ids) for ids in prompts]), prompts)
        # What follows the prompt, row by row: the first token of each continuation hangs on the prompt's last one.
        branches = [(p, list(ids)) for p, passage in enumerate(passages) for ids in passage.continuations]
        fed = [(row, p, ids[:-1]) for row, (p, ids) in zip(rows_of, branches, strict=True) if len(ids) > 1]
        states: Iterator[Tensor] = iter(())
        if fed:
            starts = [len(prompts[p]) for _, p, _ in fed]
            view = cache.view([row for row, _, _ in fed], starts, [len(ids) for _, _, ids in fed])
            states = iter(self._run(view, [ids for _, _, ids in fed]))
        before, targets = [], []  # of every text: the states that predict its tokens, and these
        for passage, prompt, own in zip(passages, prompts, hidden, strict=True):
            if passage.with_prompt:
                before.append(own[:-1])
                targets.append(prompt[1:])
        for p, ids in branches:
            last = hidden[p][-1:]
            before.append(torch.cat([last, next(states)]) if len(ids) > 1 else last)
            targets.append(ids)
        texts = iter(self._read(before, targets))
        own_scores = [next(texts) if passage.with_prompt else None for passage in passages]
        return [
            PassageScores(own, tuple(next(texts) for _ in passage.continuations))
            for own, passage in zip(own_scores, passages, strict=True)
        ]

    def _make_room(self, passages: list[Passage]) -> tuple[PagedCache, list[int], list[int]]:
        """A cache whose table has a row for each prompt and each continuation, which shares its prompt's slots."""
        tokens = sum(passage.tokens for passage in passages)
        weight = self.model.lm_head.weight
        if self._cache is None or self._cache.keys.shape[1] < tokens:
            layers, size = self.model.config.num_hidden_layers, max(tokens, self.batch_tokens)
            self._cache = PagedCache(self.model.config, layers, size, 1, 0, weight.device, weight.dtype)
        rows = len(passages) + sum(len(passage.continuations) for passage in passages)
        longest = max(passage.longest for passage in passages)
        table = np.zeros((rows, longest), dtype=np.int64)  # a block holds one token, so that any prefix can be shared
        next_slot, prompt_rows, continuation_rows = 0, [], []

        def take(row: int, start: int, count: int) -> None:
            nonlocal next_slot
            table[row, start : start + count] = np.arange(next_slot, next_slot + count)
            next_slot += count

        row = 0
        for passage in passages:
            prompt_rows.append(first := row)
            length = len(passage.prompt)
            take(row, 0, length)
            for ids in passage.continuations:
                row += 1
                continuation_rows.append(row)
                table[row, :length] = table[first, :length]
                take(row, length, len(ids) - 1)
            row += 1
        self._cache.table = table
        return self._cache, prompt_rows, continuation_rows

    def _run(self, view: CacheView, texts: list[list[int]]) -> list[Tensor]:
        """The states after each token: for each text (tokens, h)."""
        device = self.model.lm_head.weight.device
        ids = [id for i in view.order for id in texts[i]]
        hidden, _ = self.model.step(torch.tensor([ids], device=device), view)
        found: list[Tensor | None] = [None] * len(texts)
        for i, end in zip(view.order, view.ends, strict=True):
            found[i] = hidden[0, end + 1 - len(texts[i]) : end + 1]
        return found

    def _read(self, before: list[Tensor], targets: list[list[int]]) -> list[Scored]:
        """Log-probabilities of `targets` after the states `before`, (tokens, h) each; a limited piece of logits at a time."""
        if not targets:
            return []
        states = torch.cat(before)
        ids = torch.tensor([id for one in targets for id in one], device=states.device)
        known = self.tokenizer.vocab_size
        rows = max(1, 2**24 // self.model.config.vocab_size)  # 64 MB of fp32 logits
        nats, is_best = [], []
        for piece, wanted in zip(states.split(rows), ids.split(rows), strict=True):
            logits = self.model.lm_head(piece).float()
            nats.append((logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0]).double())
            is_best.append(logits[:, :known].argmax(-1) == wanted)
        all_nats, all_best = torch.cat(nats).cpu().numpy(), torch.cat(is_best).cpu().numpy()
        borders = np.cumsum([len(one) for one in targets])[:-1]
        return [Scored(*pair) for pair in zip(np.split(all_nats, borders), np.split(all_best, borders), strict=True)]


def split_at_choice(tokenizer: Tokenizer, prompt: str, choices: Sequence[str]) -> Passage:
    """A passage of texts. Tokens may cross the border between prompt and choice; where the ids of prompt + choice leave those
    of the prompt alone, the continuation begins, for all choices at the same place. So each is scored in the very tokens that
    the model has learnt text in. Raises ScoringError for a prompt or choice without text."""
    if not prompt or not choices or not all(choices):
        raise ScoringError(f"prompt {prompt[:40]!r} with choices {list(choices)[:4]}: wanted some text in each")
    alone = tokenizer.encode(prompt)
    whole = [tokenizer.encode(prompt + choice) for choice in choices]
    shared = min(_common_prefix(alone, ids) for ids in whole)
    if not shared:
        raise ScoringError(f"prompt {prompt[:40]!r}: no token of it comes before the choices; wanted a longer one")
    return Passage(alone[:shared], tuple(ids[shared:] for ids in whole))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
