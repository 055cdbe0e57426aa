"""Intervals have the known values, and hold the truth as often as they say."""

import math
import statistics

import numpy as np
import pytest

from minglm.evals.interval import Estimate, change_of_ratio, mean, ratio, share


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (100, 1.9840)]
)
def test_the_interval_of_a_mean_is_students(freedom, quantile):
    values = [float(number) for number in range(freedom + 1)]
    found = mean(values)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=2e-5)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Brown, Cai and DasGupta (2001) and Newcombe (1998), table I.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_newcombes(right, count, low, high):
    found = share([1.0] * right + [0.0] * (count - right))
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert found.value == right / count and found.count == count


def test_a_share_of_all_or_nothing_has_an_interval_that_holds_it():
    for value in (0.0, 1.0):
        found = share([value] * 10)
        assert found.low <= value <= found.high and found.high - found.low > 0.2


def test_the_mean_of_a_textbook_sample():
    found = mean([1.0, 2.0, 3.0, 4.0])  # 2.5 ± 3.1824 * 1.29099 / 2
    assert (found.low, found.high) == (pytest.approx(0.4457, abs=1e-4), pytest.approx(4.5543, abs=1e-4))


def test_one_value_has_no_interval():
    assert mean([2.0]) == Estimate(2.0, None, None, 1)
    assert ratio([1.0], [4.0]) == Estimate(0.25, None, None, 1)
    assert mean([2.0]).text() == "2.000 [?]" and not mean([2.0]).excludes(100.0)


def test_a_ratio_is_of_sums_and_its_interval_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(5, 1, 200)
    nats = sizes * rng.normal(1.5, 0.3, 200)
    found = ratio(nats, sizes)
    assert found.value == pytest.approx(nats.sum() / sizes.sum())
    picks = rng.integers(200, size=(4000, 200))
    low, high = np.quantile(nats[picks].sum(1) / sizes[picks].sum(1), [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert found.high - found.low > 0.05  # so that 0.01 is close


def test_units_of_equal_size_make_the_ratio_a_mean():
    values = [0.5, 1.0, 2.5]
    plain, as_ratio = mean(values), ratio([3 * value for value in values], [3.0] * 3)
    for key in ("value", "low", "high"):
        assert getattr(plain, key) == pytest.approx(getattr(as_ratio, key))


@pytest.mark.parametrize("kind", ["share", "mean", "ratio"])
def test_19_of_20_intervals_hold_the_truth(kind):
    rng = np.random.default_rng(1)
    trials, held = 1500, 0
    for _ in range(trials):
        if kind == "share":
            found, truth = share((rng.random(30) < 0.3).astype(float)), 0.3
        elif kind == "mean":
            found, truth = mean(rng.normal(5, 2, 4)), 5
        else:
            sizes = rng.uniform(1, 3, 25)
            found, truth = ratio(sizes * rng.normal(2, 0.5, 25), sizes), 2
        held += found.low <= truth <= found.high
    assert abs(held / trials - 0.95) < 0.025


def test_a_change_is_judged_unit_by_unit():
    """Documents differ by far more than the two models do: only a paired comparison sees the difference."""
    rng = np.random.default_rng(2)
    sizes = rng.uniform(50, 500, 40)
    hard = sizes * rng.uniform(1, 4, 40)
    easier = hard - sizes * rng.normal(0.05, 0.02, 40)
    before, after = ratio(hard, sizes), ratio(easier, sizes)
    assert before.low < after.value < before.high
    found = change_of_ratio(list(zip(hard, sizes, strict=True)), list(zip(easier, sizes, strict=True)))
    assert found.value == pytest.approx(after.value - before.value) and found.high < 0
    as_scores = change_of_ratio([(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)], [(1.0, 1.0), (0.5, 1.0), (1.0, 1.0)])
    for key in ("value", "low", "high"):
        assert getattr(as_scores, key) == pytest.approx(getattr(mean([1.0, 0.0, 0.0]), key))
    with pytest.raises(ValueError, match="wanted the same ones"):
        change_of_ratio([(1.0, 1.0)], [])


def test_excludes_means_the_whole_interval_lies_beside():
    assert Estimate(0.5, 0.4, 0.6, 10).excludes(0.25) and not Estimate(0.5, 0.4, 0.6, 10).excludes(0.6)


@pytest.mark.parametrize("measure", [share, mean, lambda values: ratio(values, values)])
@pytest.mark.parametrize("values", [[], [math.nan], [[1.0]]])
def test_no_values_have_no_estimate(measure, values):
    with pytest.raises(ValueError, match="wanted one finite number"):
        measure(values)


def test_a_score_beyond_one_is_no_share():
    with pytest.raises(ValueError, match="wanted 0 to 1"):
        share([0.5, 1.5])
    with pytest.raises(ValueError, match="wanted pairs"):
        ratio([1.0, 2.0], [1.0])
