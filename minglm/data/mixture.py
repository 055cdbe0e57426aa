"""Which domain each row of a mixture is from: shares that hold at every prefix, not only in the mean.

Row n's domain is a function of n alone. After any number of rows, each domain has had its share of them within less than
one row: each row that a domain is due has a window of rows to stand in, and the one whose window closes first is dealt
(earliest deadline first, which is optimal where one row is dealt at a time; Baruah et al., 1996, "proportionate progress").
"""

from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm

import numpy as np

LONGEST_PERIOD = 2**16  # rows after which the order repeats; weights are rounded to fit in


class Turns:
    """A period of turns of all names, which repeats for ever.

    Weights whose shares are fractions of at most `LONGEST_PERIOD` rows are kept exactly; others are rounded to the nearest
    such fractions (by largest remainder).

    Attributes:
        shares: share of the rows by name, exact.
    """

    def __init__(self, weights: Mapping[str, float]):
        """Raises ValueError for no weights, and names a weight that is not positive, not finite, or too small."""
        if not weights:
            raise ValueError("the mixture is empty; wanted a weight for at least one domain")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name!r} is {weight}; wanted a positive number, or leave the domain out")
        counts = _rows_of_period(weights)
        self._period = sum(counts.values())
        self.shares = {name: Fraction(count, self._period) for name, count in counts.items()}
        self._names = list(counts)
        self._turns = _earliest_deadline_first(list(counts.values()))
        # Rows of each name before each row of the period, int64 (period + 1, names).
        one_hot = self._turns[:, None] == np.arange(len(self._names))
        self._before = np.concatenate([np.zeros((1, len(self._names)), np.int64), np.cumsum(one_hot, axis=0)])

    def dealt(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows are of each name."""
        periods, rest = divmod(rows, self._period)
        counts = periods * self._before[-1] + self._before[rest]
        return dict(zip(self._names, counts.tolist(), strict=True))

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For numbers of rows, int64 (n,): the place of each one's name in the mixture, and its number among that name's."""
        periods, rest = np.divmod(rows, self._period)
        names = self._turns[rest]
        return names, periods * self._before[-1, names] + self._before[rest, names]


def _rows_of_period(weights: Mapping[str, float]) -> dict[str, int]:
    """How many rows of one period each name gets."""
    exact = {name: Fraction(str(float(weight))) for name, weight in weights.items()}
    whole = lcm(*(weight.denominator for weight in exact.values()))
    counts = {name: int(weight * whole) for name, weight in exact.items()}
    common = gcd(*counts.values())
    counts = {name: count // common for name, count in counts.items()}
    if sum(counts.values()) <= LONGEST_PERIOD:
        return counts
    total = sum(exact.values())
    wanted = {name: weight / total * LONGEST_PERIOD for name, weight in exact.items()}
    counts = {name: int(share) for name, share in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: LONGEST_PERIOD - sum(counts.values())]:
        counts[name] += 1
    if none := [name for name, count in counts.items() if not count]:
        raise ValueError(
            f"the weight of {none[0]!r} is {float(wanted[none[0]] / LONGEST_PERIOD):.2g} of all: less than one row in "
            f"{LONGEST_PERIOD}; give it more, or leave the domain out"
        )
    common = gcd(*counts.values())
    return {name: count // common for name, count in counts.items()}


def _earliest_deadline_first(counts: list[int]) -> np.ndarray:
    """Whose turn each row of the period is, int64 (period,). The j-th row of a share w (from 0) may stand in the rows
    floor(j / w) to ceil((j + 1) / w) - 1: earlier it would be a row ahead, later a row behind."""
    period = sum(counts)
    turns = np.empty(period, np.int64)
    dealt = [0] * len(counts)
    for row in range(period):
        due = [
            (-(-(dealt[i] + 1) * period // count), i)
            for i, count in enumerate(counts)
            if dealt[i] < count and dealt[i] * period // count <= row
        ]
        _, turns[row] = min(due)
        dealt[turns[row]] += 1
    return turns
