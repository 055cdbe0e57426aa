"""Batches of training sequences, dealt from prepared shards.

Sequence n of a stream is a function of (seed, n) alone, whoever asks for it, so that the stream's whole state is one
integer: a run resumes exactly, on however many ranks, workers or micro-batches it goes on.

    stream = TokenStream(dataset, TRAIN, 1024, seed=1)                                 # all the data
    stream = MixtureStream(dataset, TRAIN, 1024, 1, {"code": 0.7, "prose_best": 0.3}, "best_fit")
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from minglm.data.mixture import Turns
from minglm.data.packing import BEST_FIT, IGNORED, PACKINGS, PADDING, TRUNCATE, Bins, Line, Ring, Rows, draws, line_in_rows
from minglm.data.shards import Dataset
from minglm.data.sources import HELD_OUT

__all__ = ["IGNORED", "PADDING", "Batch", "MixtureStream", "RowStream", "StreamError", "TokenStream", "held_out_batches"]


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


class Pool(Protocol):
    """What a stream deals from: so many rows an epoch, in an order of its own in each."""

    rows_per_epoch: int

    def rows(self, epoch: int, numbers: np.ndarray) -> Rows:
        """Rows `numbers` (int64 (rows,), each below `rows_per_epoch`) of this epoch."""


class RowStream:
    """An endless sequence of rows that are dealt from pools in turns by weight (`minglm.data.mixture`).

    `position` counts sequences dealt, by all ranks together. `identity` says what is dealt: a state that has another one is
    refused.
    """

    def __init__(
        self, sequence_length: int, pools: Mapping[str, Pool], weights: Mapping[str, float], identity: Mapping[str, object]
    ):
        self.sequence_length = sequence_length
        self.position = 0
        self._pools, self._turns = pools, Turns(weights)
        self._identity = dict(identity)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that the documents fill; of a mixture, those of all its domains together."""
        return sum(pool.rows_per_epoch for pool in self._pools.values())

    def batch(self, first: int, count: int) -> Batch:
        """Sequences number `first` to `first + count - 1`: the same whenever and by whomever they are asked for."""
        whose, numbers = self._turns.at(np.arange(first, first + count))
        rows = Rows(*(np.empty((count, self.sequence_length), dtype) for dtype in (np.int64, np.int64, np.int32)))
        for index, pool in enumerate(self._pools.values()):
            epochs, places = np.divmod(numbers, pool.rows_per_epoch)
            for epoch in np.unique(epochs[whose == index]):
                chosen = (whose == index) & (epochs == epoch)
                for array, part in zip(rows, pool.rows(int(epoch), places[chosen]), strict=True):
                    array[chosen] = part
        return _batch(rows)

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


class TokenStream(RowStream):
    """An endless, seeded sequence of the documents of some domains, packed by random truncation (`Ring`)."""

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
        _check_numbers(sequence_length, seed)
        ring = _pool(dataset, split, sequence_length, seed, domains, TRUNCATE)
        self._set(dataset, split, sequence_length, seed, {"all": ring}, {"all": 1})
        self._identity["domains"] = sorted(domains) if domains else None

    def _set(
        self,
        dataset: Dataset,
        split: str,
        sequence_length: int,
        seed: int,
        pools: Mapping[str, Ring | Bins],
        weights: Mapping[str, float],
    ) -> None:
        identity = {"dataset": dataset.fingerprint, "split": split, "sequence_length": sequence_length, "seed": seed}
        super().__init__(sequence_length, pools, weights, identity)


class MixtureStream(TokenStream):
    """A stream whose sequences are each of one domain, in shares that follow the weights within one sequence at every
    position (`minglm.data.mixture`). Weights are shares of tokens: sequences are of one length.

    With one domain and "truncate" it is exactly the `TokenStream` of that domain.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        sequence_length: int,
        seed: int,
        mixture: Mapping[str, float],
        packing: str = TRUNCATE,
    ):
        """Deal the documents of `split`, of the domains in `mixture` (domain -> weight, any positive numbers).

        packing: "truncate" (`Ring`) or "best_fit" (`Bins`).

        Raises StreamError for a domain that is not there or holds no text for one sequence, an unfit weight, another packing.
        """
        _check_numbers(sequence_length, seed)
        if packing not in PACKINGS:
            raise StreamError(f"packing is {packing!r}; wanted one of {', '.join(PACKINGS)}")
        pools = {domain: _pool(dataset, split, sequence_length, seed, [domain], packing) for domain in sorted(mixture)}
        try:
            self._set(dataset, split, sequence_length, seed, pools, {domain: mixture[domain] for domain in pools})
        except ValueError as error:
            raise StreamError(str(error)) from error
        self._identity |= {"mixture": {domain: str(share) for domain, share in self._turns.shares.items()}, "packing": packing}

    @property
    def waste(self) -> float:
        """Share of the dealt positions that are padding."""
        return float(sum(share * self._pools[domain].waste for domain, share in self._turns.shares.items()))

    def epochs(self, sequences: int) -> dict[str, float]:
        """How often each domain has been read when `sequences` have been dealt."""
        dealt = self._turns.dealt(sequences)
        return {domain: dealt[domain] / pool.rows_per_epoch for domain, pool in self._pools.items()}


def _check_numbers(sequence_length: int, seed: int) -> None:
    if sequence_length < 1:
        raise StreamError(f"sequence_length is {sequence_length}; wanted at least 1")
    if not 0 <= seed < 2**64:
        raise StreamError(f"seed is {seed}; wanted 0 to 2**64 - 1")


def _pool(
    dataset: Dataset, split: str, sequence_length: int, seed: int, domains: Sequence[str] | None, packing: str
) -> Ring | Bins:
    """The documents of these domains, packed; refused where they do not fill one sequence."""
    documents = _documents_of(dataset, split, domains)
    num_tokens = int(dataset.splits[split].lengths[documents].sum())
    if num_tokens < sequence_length:
        raise StreamError(
            f"{dataset.folder}: the {len(documents)} {split} documents of {_names(domains)} hold "
            f"{num_tokens} tokens, fewer than one sequence of {sequence_length}; "
            "give more text or a shorter sequence_length"
        )
    if packing == BEST_FIT:
        return Bins(dataset.splits[split], documents, sequence_length, seed, dataset.end_of_document_id)
    return Ring(dataset.splits[split], documents, sequence_length, seed)


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
    domains = None if domain is None else [domain]
    documents = _documents_of(dataset, HELD_OUT, domains)
    if not len(documents):
        raise StreamError(f"{dataset.folder}: no held-out documents of {_names(domains)}; give more text")
    if max_tokens is not None and max_tokens < 1:
        raise StreamError(f"max_tokens is {max_tokens}; wanted at least 1, or None for all held-out tokens")
    shuffled = np.argsort(draws(0, 0).random_raw(len(documents)), kind="stable")
    line = Line(dataset.splits[HELD_OUT], documents[shuffled])
    num_tokens = min(int(line.ends[-1]), max_tokens or line.ends[-1])
    return map(_batch, line_in_rows(line, (batch_size, sequence_length), num_tokens, dataset.end_of_document_id))


def _batch(rows: Rows) -> Batch:
    return Batch(*map(torch.from_numpy, rows))


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
