"""Packing and mixtures, with datasets whose every token is a running number (tests/test_data_stream.py)."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data_stream import DOMAINS, dataset_of, equal, rows

from minglm.data.mixture import LONGEST_PERIOD, Turns
from minglm.data.packing import MOST_WASTE, PACKINGS, best_fit, pack
from minglm.data.stream import IGNORED, PADDING, MixtureStream, StreamError, TokenStream


@st.composite
def mixtures(draw, packings=PACKINGS) -> MixtureStream:
    """A mixture of up to three domains, each with text for one sequence."""
    names = draw(st.lists(st.sampled_from(DOMAINS), min_size=1, max_size=3, unique=True))
    size = draw(st.integers(1, 12))
    lengths, domains = [], []
    for name in names:
        some = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
        some.append(max(1, size - sum(some)))
        lengths += some
        domains += [DOMAINS.index(name)] * len(some)
    order = draw(st.permutations(range(len(lengths))))
    dataset = dataset_of([lengths[i] for i in order], [domains[i] for i in order])
    weights = {name: draw(st.integers(1, 20)) / 4 for name in names}
    return MixtureStream(dataset, "train", size, draw(st.integers(0, 2**64 - 1)), weights, draw(st.sampled_from(packings)))


def split_of(stream: MixtureStream):
    return next(iter(stream._pools.values()))._split


@given(mixtures(), st.integers(0, 50), st.integers(1, 12))
def test_a_sequence_of_a_mixture_is_independent_of_the_batch_it_is_in(stream, first, count):
    alone = [stream.batch(number, 1) for number in range(first, first + count)]
    assert equal(stream.batch(first, count), rows(alone))


@given(mixtures(), st.integers(0, 20), st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]), st.integers(1, 3))
def test_a_mixture_is_independent_of_ranks_micro_batches_and_workers_and_resumes(stream, position, layout, steps):
    world_size, count = layout
    whole = stream.batch(position, 6 * steps)
    found = []
    for step in range(steps):
        for rank in range(world_size):
            stream.position = position + 6 * step
            state = stream.state_dict()
            stream.position = 0
            stream.load_state_dict(state)
            found.append(stream.next(count, rank, world_size))
    assert equal(whole, rows(found))


@given(mixtures(), st.integers(0, 60))
def test_each_sequence_is_of_one_domain_and_shares_hold_within_one_row_at_every_prefix(stream, count):
    batch = stream.batch(0, count)
    split = split_of(stream)
    first = batch.input_ids.numpy()
    document = np.searchsorted(split.offsets, first, side="right") - 1
    domain = split.domains[np.minimum(document, len(split.domains) - 1)].astype(int)
    domain[batch.document_ids.numpy() == PADDING] = PADDING
    dealt = Counter()
    for number, row in enumerate(domain, 1):
        [only] = set(row.tolist()) - {PADDING}
        dealt[DOMAINS[only]] += 1
        assert all(abs(dealt[name] - number * share) < 1 for name, share in stream._turns.shares.items())
    assert stream.epochs(count) == {name: dealt[name] / pool.rows_per_epoch for name, pool in stream._pools.items()}


@given(mixtures(["best_fit"]), st.integers(0, 3))
def test_best_fit_deals_every_token_once_an_epoch_each_part_in_one_row(stream, epoch):
    split = split_of(stream)
    for pool in stream._pools.values():
        order = np.arange(pool.rows_per_epoch)
        found = pool.rows(epoch, order)
        real = found.document_ids != PADDING
        tokens = found.input_ids[real]
        lengths = split.lengths[pool._documents]
        wanted = np.concatenate([np.arange(*split.offsets[d : d + 2]) for d in pool._documents])
        assert np.array_equal(np.sort(tokens), np.sort(wanted))
        is_last = np.isin(found.input_ids, split.offsets[1:] - 1)
        assert np.array_equal(found.labels, np.where(is_last | ~real, IGNORED, found.input_ids + 1))
        assert (found.input_ids[~real] == 10**6).all()
        assert pool.waste == pytest.approx(1 - real.mean())
        for ids, documents in zip(found.input_ids, found.document_ids, strict=True):
            assert documents[0] == 0 and (np.diff(documents[documents >= 0]) >= 0).all()
            assert (np.diff((documents == PADDING).astype(int)) >= 0).all(), "padding comes last"
            for number in range(documents.max() + 1):
                piece = ids[documents == number]
                end = split.offsets[np.searchsorted(split.offsets, piece[0], side="right")]
                assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))
                assert piece[-1] < end
        assert lengths.sum() == len(tokens)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_best_fit_decreasing_puts_each_item_where_it_leaves_the_least_room(lengths, size):
    lengths = np.array(lengths)
    found = best_fit(lengths, size)
    room: list[int] = []
    naive = np.empty(len(lengths), int)
    for item in np.argsort(-lengths, kind="stable"):
        fitting = [(left, row) for row, left in enumerate(room) if left >= lengths[item]]
        least = min(fitting, default=(size, len(room)))[0]
        if not fitting:
            room.append(size)
        mine = found[item]
        assert mine < len(room) and room[mine] == least
        naive[item] = mine
        room[mine] -= lengths[item]
    assert (np.bincount(found, lengths) <= size).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
@example([14] * 40, 20)
@example([1] * 19, 20)
def test_packing_wastes_little_and_cuts_items_only_where_whole_ones_would_waste_more(lengths, size):
    lengths = np.array(lengths)
    total, whole = lengths.sum(), best_fit(lengths, size)
    parts = pack(lengths, size)
    assert sorted(set(parts.rows.tolist())) == list(range(parts.rows.max() + 1))
    assert (np.bincount(parts.rows, parts.lengths) <= size).all() and (parts.lengths > 0).all()
    for item, length in enumerate(lengths):  # the parts are the item again
        mine = parts.items == item
        order = np.argsort(parts.offsets[mine])
        ends = np.cumsum(parts.lengths[mine][order])
        assert ends[-1] == length and np.array_equal(parts.offsets[mine][order], [0, *ends[:-1]])
    num_rows, fewest = parts.rows.max() + 1, -(-total // size)
    assert num_rows == fewest or total > (1 - MOST_WASTE) * size * num_rows - size
    assert num_rows == fewest or 1 - total / (num_rows * size) <= MOST_WASTE or len(parts.items) == len(lengths)
    if 1 - total / ((whole.max() + 1) * size) <= MOST_WASTE or whole.max() + 1 == fewest:
        assert np.array_equal(parts.rows, whole), "nothing is cut where whole items fit well"


def test_reasonable_lengths_are_not_cut():
    lengths = np.random.default_rng(0).integers(20, 1025, 5000)
    assert len(pack(lengths, 1024).items) == len(lengths)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 40), min_size=1), st.integers(0, 400))
def test_turns_follow_whole_weights_exactly(weights, rows):
    turns = Turns(weights)
    total = sum(weights.values())
    assert {name: float(share) for name, share in turns.shares.items()} == {n: w / total for n, w in weights.items()}
    names, numbers = turns.at(np.arange(rows))
    for place, (name, weight) in enumerate(weights.items()):
        mine = names == place
        assert np.array_equal(numbers[mine], np.arange(mine.sum())), "rows of a domain count up without a gap"
        ahead = np.cumsum(mine) * total - np.arange(1, rows + 1) * weight
        assert (np.abs(ahead) < total).all()
        assert turns.dealt(rows)[name] == mine.sum()


@settings(max_examples=5)
@given(st.lists(st.floats(0.01, 1, exclude_min=True), min_size=2, max_size=6))
@example([1 / 3, 1 / 7, 0.1])
def test_other_weights_are_rounded_to_the_longest_period(weights):
    turns = Turns({str(i): weight for i, weight in enumerate(weights)})
    shares = np.array([float(share) for share in turns.shares.values()])
    assert np.abs(shares - np.array(weights) / sum(weights)).max() <= 1 / LONGEST_PERIOD
    names, _ = turns.at(np.arange(2**40, 2**40 + 1000))
    before, after = turns.dealt(2**40), turns.dealt(2**40 + 1000)
    for place, name in enumerate(turns.shares):
        assert after[name] - before[name] == (names == place).sum()
        assert abs(after[name] - shares[place] * (2**40 + 1000)) < 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 9), st.integers(0, 99))
def test_a_mixture_of_one_domain_is_its_token_stream(lengths, seed, first):
    dataset = dataset_of(lengths)
    mixture = MixtureStream(dataset, "train", min(5, sum(lengths)), seed, {"prose": 0.3})
    assert equal(mixture.batch(first, 4), TokenStream(dataset, "train", min(5, sum(lengths)), seed, ["prose"]).batch(first, 4))


@pytest.mark.parametrize(
    "arguments, found",
    [
        (({"prose": 1, "poems": 1}, "truncate"), "no domain 'poems'; wanted some of prose, code, letters"),
        (({"prose": 1, "code": 0}, "truncate"), "the weight of 'code' is 0; wanted a positive number, or leave"),
        (({"prose": 1, "code": float("nan")}, "truncate"), "the weight of 'code' is nan"),
        (({"prose": 1, "code": 1e-9}, "truncate"), "the weight of 'code' is 1e-09 of all: less than one row in 65536"),
        (({"prose": 1, "letters": 1}, "best_fit"), "the 0 train documents of domain letters hold 0 tokens, fewer than"),
        (({"prose": 1}, "worst_fit"), "packing is 'worst_fit'; wanted one of truncate, best_fit"),
        (({}, "truncate"), "the mixture is empty"),
    ],
)
def test_impossible_mixtures_are_refused_and_the_culprit_named(arguments, found):
    with pytest.raises(StreamError, match=found):
        MixtureStream(dataset_of([9, 9], [0, 1]), "train", 4, 1, *arguments)


def test_the_state_of_another_mixture_is_refused_and_the_difference_named():
    dataset = dataset_of([9, 9], [0, 1])
    state = MixtureStream(dataset, "train", 4, 1, {"prose": 1, "code": 3}).state_dict()
    with pytest.raises(StreamError, match="mixture: found .*3/4.* wanted .*1/4"):
        MixtureStream(dataset, "train", 4, 1, {"prose": 3, "code": 1}).load_state_dict(state)
    with pytest.raises(StreamError, match="packing: found 'truncate', wanted 'best_fit'"):
        MixtureStream(dataset, "train", 4, 1, {"prose": 1, "code": 3}, "best_fit").load_state_dict(state)
    MixtureStream(dataset, "train", 4, 1, {"code": 6, "prose": 2}).load_state_dict(state)  # the same shares


def test_epochs_of_best_fit_deal_the_same_rows_in_another_order():
    stream = MixtureStream(dataset_of([7] * 40), "train", 14, 0, {"prose": 1}, "best_fit")
    first, second = ([tuple(row) for row in stream.batch(20 * epoch, 20).input_ids.tolist()] for epoch in range(2))
    assert first != second and set(first) == set(second)
    assert isinstance(stream.batch(0, 2).input_ids, torch.Tensor)
