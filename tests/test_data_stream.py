"""The stream of training sequences. Every token in these datasets is a running number, so a token tells where it is
from: the token after n is n + 1, unless n ends a document."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.packing import Ring
from minglm.data.shards import Dataset, Split
from minglm.data.stream import Batch, StreamError, TokenStream, held_out_batches

DOMAINS = ["prose", "code", "letters"]


def dataset_of(lengths: list[int], domains: list[int] | None = None, fingerprint: str = "f") -> Dataset:
    """Documents of these lengths, in shards of two documents each; train and held-out alike."""
    offsets = np.cumsum([0, *lengths])
    starts = offsets[:-1][::2]
    shards = tuple(np.arange(*ends, dtype=np.uint32) for ends in itertools.pairwise([*starts, offsets[-1]]))
    split = Split(shards, starts, offsets, np.array(domains or [0] * len(lengths), np.uint8))
    files = {f"{name}-domains.npy": {"sha256": ""} for name in ("train", "held_out")}
    manifest = {
        "tokenizer": {"fingerprint": fingerprint, "end_of_document_id": 10**6},
        "domains": DOMAINS,
        "splits": {"train": {"sha256": ""}, "held_out": {"sha256": ""}},
        "files": files,
    }
    return Dataset(Path("folder"), manifest, {"train": split, "held_out": split})


def pool_of(stream: TokenStream) -> Ring:
    return stream._pools["all"]


def last_tokens(dataset: Dataset) -> torch.Tensor:
    return torch.from_numpy(dataset.splits["train"].offsets[1:] - 1)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def rows(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in batches), strict=True)))


@st.composite
def streams(draw) -> TokenStream:
    """A stream over up to 12 documents; sequence lengths from 1 to the whole of them."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    sequence_length = draw(st.integers(1, sum(lengths)))
    return TokenStream(dataset_of(lengths), "train", sequence_length, draw(st.integers(0, 2**64 - 1)))


@given(streams(), st.integers(0, 50), st.integers(1, 20))
def test_a_sequence_is_independent_of_the_batch_it_is_in(stream, first, count):
    alone = [stream.batch(number, 1) for number in range(first, first + count)]
    assert equal(stream.batch(first, count), rows(alone))


@given(streams(), st.integers(0, 20), st.sampled_from([(1, 12), (2, 6), (3, 4), (12, 1)]), st.integers(1, 3))
def test_position_and_content_are_independent_of_rank_layout_and_micro_batches(stream, position, layout, steps):
    world_size, count = layout
    whole = stream.batch(position, 12 * steps)
    ranks = []
    for rank in range(world_size):
        stream.position = position
        ranks.append([stream.next(count, rank, world_size) for _ in range(steps)])
        assert stream.position == position + 12 * steps
    by_step = [rows([ranks[rank][step] for rank in range(world_size)]) for step in range(steps)]
    assert equal(whole, rows(by_step))


@given(streams(), st.integers(0, 3))
def test_each_epoch_covers_every_token_once_but_for_the_overlap_of_its_last_sequence_with_its_first(stream, epoch):
    tokens = stream.batch(epoch * stream.sequences_per_epoch, stream.sequences_per_epoch).input_ids
    seen = torch.bincount(tokens.flatten(), minlength=pool_of(stream).num_tokens)
    assert len(seen) == pool_of(stream).num_tokens
    assert seen.min() == 1 and seen.max() <= 2
    assert (seen == 2).sum() < stream.sequence_length


@given(streams(), st.integers(0, 100))
def test_labels_are_the_next_token_of_the_document_and_ignored_at_its_last_one(stream, first):
    batch = stream.batch(first, 5)
    is_last = torch.isin(batch.input_ids, torch.from_numpy(pool_of(stream)._split.offsets[1:] - 1))
    assert torch.equal(batch.labels, torch.where(is_last, -100, batch.input_ids + 1))
    assert [tensor.dtype for tensor in vars(batch).values()] == [torch.int64, torch.int64, torch.int32]


@given(streams(), st.integers(0, 100))
def test_document_ids_count_from_zero_in_each_row_and_rise_by_one_after_each_last_token(stream, first):
    batch = stream.batch(first, 5)
    is_last = torch.isin(batch.input_ids, torch.from_numpy(pool_of(stream)._split.offsets[1:] - 1))
    assert (batch.document_ids[:, 0] == 0).all()
    assert torch.equal(batch.document_ids.diff(dim=1), is_last[:, :-1].int())


@given(streams(), st.lists(st.integers(1, 8), max_size=6), st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_a_resumed_stream_goes_on_as_the_undisturbed_one_within_and_across_epochs(stream, before, after):
    for count in before:
        stream.next(count)
    state = stream.state_dict()
    goes_on = [stream.next(count) for count in after]
    resumed = TokenStream(dataset_of(list(pool_of(stream)._split.lengths)), "train", stream.sequence_length, state["seed"])
    resumed.load_state_dict(state)
    assert equal(rows(goes_on), rows([resumed.next(count) for count in after]))
    assert resumed.state_dict() == stream.state_dict()


def test_epochs_and_seeds_differ_in_order_and_in_cuts():
    def dealt(seed: int, epoch: int) -> list[tuple[int, ...]]:
        stream = TokenStream(dataset_of([40] * 25), "train", 10, seed)
        return [tuple(row) for row in stream.batch(100 * epoch, 100).input_ids.tolist()]

    orders = [dealt(0, 0), dealt(0, 1), dealt(1, 0), dealt(2**64 - 1, 0)]
    for a, b in itertools.combinations(orders, 2):
        assert a != b and set(a) != set(b)


def test_one_long_document_is_not_dealt_from_front_to_back():
    stream = TokenStream(dataset_of([1000]), "train", 10, seed=0)
    first_tokens = stream.batch(0, 100).input_ids[:, 0]
    follows = (first_tokens.diff() == 10).sum()
    assert follows < 10


def test_the_draws_are_the_same_with_every_version_of_numpy():
    stream = TokenStream(dataset_of([5, 6, 7, 8]), "train", 5, seed=3)
    assert stream.batch(0, 2).input_ids.tolist() == [[19, 20, 21, 22, 23], [3, 4, 5, 6, 7]]
    assert stream.batch(2**40, 1).input_ids.tolist() == [[7, 8, 9, 10, 18]]


def test_only_documents_of_the_domains_asked_for_are_dealt():
    dataset = dataset_of([5] * 9, domains=[0, 1, 2] * 3)
    stream = TokenStream(dataset, "train", 5, seed=0, domains=["letters", "code"])
    documents = stream.batch(0, stream.sequences_per_epoch).input_ids.unique() // 5
    assert documents.unique().tolist() == [1, 2, 4, 5, 7, 8]
    [batch] = held_out_batches(dataset, 5, 3, domain="code")
    assert (batch.input_ids.unique() // 5).unique().tolist() == [1, 4, 7]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 5))
def test_held_out_batches_hold_every_token_once_and_padding_after_the_last(lengths, sequence_length, batch_size):
    dataset = dataset_of(lengths)
    batches = list(held_out_batches(dataset, sequence_length, batch_size))
    assert all(batch.input_ids.shape == (batch_size, sequence_length) for batch in batches)
    everything = rows(batches)
    padding = everything.document_ids == -1
    tokens = everything.input_ids[~padding]
    assert tokens.sort().values.tolist() == list(range(sum(lengths)))
    is_last = torch.isin(tokens, last_tokens(dataset))
    assert torch.equal(everything.labels[~padding], torch.where(is_last, -100, tokens + 1))
    assert (everything.labels[padding] == -100).all() and (everything.input_ids[padding] == 10**6).all()
    assert torch.equal(padding.flatten(), torch.arange(padding.numel()) >= sum(lengths)), "padding comes last"
    assert padding.sum() < batch_size * sequence_length, "no batch is all padding"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 200))
def test_max_tokens_takes_the_first_ones_of_the_same_order(lengths, sequence_length, max_tokens):
    dataset = dataset_of(lengths)
    everything = rows(list(held_out_batches(dataset, sequence_length, 2)))
    some = rows(list(held_out_batches(dataset, sequence_length, 2, max_tokens)))
    taken = some.document_ids != -1
    assert taken.sum() == min(max_tokens, sum(lengths))
    size = len(some.input_ids)
    for name in ("input_ids", "labels", "document_ids"):
        assert torch.equal(getattr(some, name)[taken], getattr(everything, name)[:size][taken])


def test_fewer_tokens_than_a_sequence_are_refused_with_both_numbers():
    with pytest.raises(StreamError, match="the 2 train documents of all domains hold 11 tokens, fewer .* of 12"):
        TokenStream(dataset_of([5, 6]), "train", 12, seed=0)
    with pytest.raises(StreamError, match="the 1 train documents of domain code hold 6 tokens"):
        TokenStream(dataset_of([5, 6], [0, 1]), "train", 7, seed=0, domains=["code"])


@pytest.mark.parametrize(
    "arguments, found",
    [
        (("train", 0, 0), "sequence_length is 0"),
        (("train", 4, -1), "seed is -1"),
        (("train", 4, 2**64), "seed is 18446744073709551616"),
        (("test", 4, 0), "no split 'test'; wanted one of train, held_out"),
        (("train", 4, 0, ["poems"]), "no domain 'poems'; wanted some of prose, code, letters"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, found):
    with pytest.raises(StreamError, match=found):
        TokenStream(dataset_of([5, 6]), *arguments)


def test_held_out_batches_refuse_a_domain_without_held_out_documents():
    with pytest.raises(StreamError, match="no held-out documents of domain code"):
        held_out_batches(dataset_of([5, 6]), 4, 2, domain="code")
    with pytest.raises(StreamError, match="max_tokens is 0"):
        held_out_batches(dataset_of([5, 6]), 4, 2, max_tokens=0)


@pytest.mark.parametrize(
    "other, found",
    [
        (lambda d: TokenStream(d, "train", 4, seed=2), "seed: found 1, wanted 2"),
        (lambda d: TokenStream(d, "train", 5, seed=1), "sequence_length: found 4, wanted 5"),
        (lambda d: TokenStream(d, "held_out", 4, seed=1), "split: found 'train', wanted 'held_out'"),
        (lambda d: TokenStream(d, "train", 4, seed=1, domains=["prose"]), r"domains: found None, wanted \['prose'\]"),
        (
            lambda d: TokenStream(dataset_of([9, 9], fingerprint="g"), "train", 4, seed=1),
            "dataset: found '.*', wanted '",
        ),
    ],
)
def test_the_state_of_another_stream_is_refused_and_the_difference_named(other, found):
    dataset = dataset_of([9, 9])
    state = TokenStream(dataset, "train", 4, seed=1).state_dict()
    stream = other(dataset)
    with pytest.raises(StreamError, match=found):
        stream.load_state_dict(state)
    assert stream.position == 0
