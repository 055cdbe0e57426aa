"""Batches of training sequences, dealt from prepared shards.

Documents are shuffled, concatenated and cut at the sequence length: GLM-4.5's "random truncation" (paper, section 2.3),
which packs without waste and doubles as augmentation, because each epoch cuts elsewhere. Sequence n is a function of
(seed, n) alone, whoever asks for it, so that the stream's whole state is one integer: a run resumes exactly, on however
many ranks, workers or micro-batches it goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from minglm.data.shards import Dataset, Split
from minglm.data.sources import HELD_OUT

IGNORED = -100  # the label that the loss leaves out
PADDING = -1  # the document id of padding


class StreamError(ValueError):
    """A stream that cannot be made or resumed. The message names what was found and what was wanted."""


@dataclass(frozen=True)
class Batch:
    """Sequences, (batch, sequence).

    `labels` is `input_ids` shifted by one (labels[t] = the token after input_ids[t]); -100, which the loss ignores, at
    the last token of a document, because the next document does not follow from it, and at padding. `document_ids`
    counts the documents within each row from 0, -1 at padding: attention must not cross them.
    """

    input_ids: torch.Tensor  # int64
    labels: torch.Tensor  # int64
    document_ids: torch.Tensor  # int32


class TokenStream:
    """An endless, seeded sequence of training sequences.

    In each epoch, the documents are laid end to end as a ring of N tokens, which is cut into ceil(N / sequence_length)
    sequences. (seed, epoch) decides the order of the documents, where the first cut is, and the order in which the
    sequences are dealt: neighbours on the ring are often parts of one long document. So every token is an input once
    an epoch, except that the last sequence ends with fewer than sequence_length tokens that the first begins with.

    `position` counts sequences dealt, by all ranks together.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        sequence_length: int,
        seed: int,
        domains: Sequence[str] | None = None,
    ):
        """Deal the documents of `split`, of all domains or those named.

        Raises StreamError if they hold fewer tokens than one sequence, or an argument is out of its range.
        """
        if sequence_length < 1:
            raise StreamError(f"sequence_length is {sequence_length}; wanted at least 1")
        if not 0 <= seed < 2**64:
            raise StreamError(f"seed is {seed}; wanted 0 to 2**64 - 1")
        self.sequence_length = sequence_length
        self.position = 0
        self._seed = seed
        self._documents = _documents_of(dataset, split, domains)
        self._split = dataset.splits[split]
        self._num_tokens = int(self._split.lengths[self._documents].sum())
        if self._num_tokens < sequence_length:
            raise StreamError(
                f"{dataset.folder}: the {len(self._documents)} {split} documents of {_names(domains)} hold "
                f"{self._num_tokens} tokens, fewer than one sequence of {sequence_length}; "
                "give more text or a shorter sequence_length"
            )
        self._identity = {
            "dataset": dataset.fingerprint,
            "split": split,
            "domains": sorted(domains) if domains else None,
            "sequence_length": sequence_length,
            "seed": seed,
        }
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # two, for batches across the border of epochs

    @property
    def sequences_per_epoch(self) -> int:
        return -(-self._num_tokens // self.sequence_length)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences number `first` to `first + count - 1`: the same whenever and by whomever they are asked for."""
        epochs, places = np.divmod(np.arange(first, first + count), self.sequences_per_epoch)
        parts = [self._epoch(int(epoch)).sequences(places[epochs == epoch]) for epoch in np.unique(epochs)]
        return _batch(*map(np.concatenate, zip(*parts, strict=True)))

    def next(self, count: int, rank: int = 0, world_size: int = 1) -> Batch:
        """This rank's `count` of the next `count * world_size` sequences; every rank moves on past all of them."""
        batch = self.batch(self.position + rank * count, count)
        self.position += count * world_size
        return batch

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from `state`. Raises StreamError, naming each difference, if it is the state of another stream."""
        differences = [
            f"{key}: found {state.get(key)!r}, wanted {wanted!r}"
            for key, wanted in self._identity.items()
            if state.get(key) != wanted
        ]
        if differences:
            raise StreamError("this is the state of another data stream: " + "; ".join(differences))
        self.position = state["position"]

    def _draw_epoch(self, epoch: int) -> "_Epoch":
        # Philox is keyed by exactly these two numbers, and NumPy promises that its raw draws never change
        # (`Generator.permutation` may, and with it the data of a run that is resumed).
        draw = np.random.Philox(key=self._seed + (epoch << 64)).random_raw
        return _Epoch(
            line=_Line(self._split, self._documents[np.argsort(draw(len(self._documents)), kind="stable")]),
            start=draw() % self._num_tokens,
            order=np.argsort(draw(self.sequences_per_epoch), kind="stable"),
            sequence_length=self.sequence_length,
        )


class _Line:
    """Documents laid end to end."""

    def __init__(self, split: Split, documents: np.ndarray):
        lengths = split.lengths[documents]
        self.split = split
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.shifts = split.offsets[documents] - self.starts  # from a place on the line to the position in the shards

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens at `places`, int64, and whether each is the first of its document; both of the shape of `places`."""
        document = np.searchsorted(self.ends, places, side="right")
        return self.split.tokens_at(places + self.shifts[document]), places == self.starts[document]


@dataclass(frozen=True)
class _Epoch:
    line: _Line
    start: int  # where on the line the first cut is
    order: np.ndarray  # which cut is dealt when
    sequence_length: int

    def sequences(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_Line.read` for the sequences `numbers` of this epoch, each with the token after it: (sequences, t + 1)."""
        places = self.start + self.order[numbers, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        return self.line.read(places % self.line.ends[-1])


def held_out_batches(
    dataset: Dataset,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    domain: str | None = None,
) -> Iterator[Batch]:
    """Every held-out token once, always in the same order; or the first `max_tokens`.

    The documents are shuffled once and for all, so that the first `max_tokens` are a sample of all sources. Each batch
    is (batch_size, sequence_length); what is left over in the last one is padding. Raises StreamError if there are no
    held-out documents (of this domain).
    """
    split = dataset.splits[HELD_OUT]
    domains = None if domain is None else [domain]
    documents = _documents_of(dataset, HELD_OUT, domains)
    if not len(documents):
        raise StreamError(f"{dataset.folder}: no held-out documents of {_names(domains)}; give more text")
    if max_tokens is not None and max_tokens < 1:
        raise StreamError(f"max_tokens is {max_tokens}; wanted at least 1, or None for all held-out tokens")
    shuffled = np.argsort(np.random.Philox(key=0).random_raw(len(documents)), kind="stable")
    line = _Line(split, documents[shuffled])
    num_tokens = min(int(line.ends[-1]), max_tokens or line.ends[-1])
    batch_places = np.arange(batch_size)[:, None] * sequence_length + np.arange(sequence_length + 1)  # (b, t + 1)
    return (
        _padded_batch(line, first + batch_places, num_tokens, dataset.end_of_document_id)
        for first in range(0, num_tokens, batch_size * sequence_length)
    )


def _padded_batch(line: _Line, places: np.ndarray, num_tokens: int, padding_id: int) -> Batch:
    batch = _batch(*line.read(places % line.ends[-1]))
    padding = torch.from_numpy(places[:, :-1] >= num_tokens)
    batch.input_ids[padding] = padding_id
    batch.labels[padding] = IGNORED
    batch.document_ids[padding] = PADDING
    return batch


def _batch(tokens: np.ndarray, is_first: np.ndarray) -> Batch:
    """A batch from (b, t + 1) tokens and whether each is the first of its document."""
    document_ids = np.cumsum(is_first[:, :-1], axis=1, dtype=np.int32)
    return Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(np.where(is_first[:, 1:], IGNORED, tokens[:, 1:])),
        document_ids=torch.from_numpy(document_ids - is_first[:, :1]),  # counted from 0, even where a row begins one
    )


def _documents_of(dataset: Dataset, split: str, domains: Sequence[str] | None) -> np.ndarray:
    """Indices of the documents of these domains, or of all."""
    if split not in dataset.splits:
        raise StreamError(f"{dataset.folder}: no split {split!r}; wanted one of {', '.join(dataset.splits)}")
    for domain in domains or ():
        if domain not in dataset.domains:
            raise StreamError(f"{dataset.folder}: no domain {domain!r}; wanted some of {', '.join(dataset.domains)}")
    of_domain = [not domains or domain in domains for domain in dataset.domains]
    return np.flatnonzero(np.array(of_domain)[dataset.splits[split].domains])


def _names(domains: Sequence[str] | None) -> str:
    return f"domain {', '.join(domains)}" if domains else "all domains"
