"""How sure a measured number is: 95% intervals for shares, means and ratios.

A model is judged on a sample of problems or documents; another sample would have given another number. The intervals say
how far another one: 95 of 100 such intervals hold the number that all problems of the kind would give.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

NORMAL_95 = 1.959963984540054  # the two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number, its 95% interval, and how many problems (documents, seeds) it was measured on.

    low and high are None where the sample cannot say: a mean of one.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    @property
    def numbers(self) -> list[float | None]:
        """Value, low, high: for JSON."""
        return [self.value, self.low, self.high]

    def text(self, digits: int = 3) -> str:
        """`0.250 [0.145, 0.396]`; `0.250 [?]` without an interval."""
        interval = "?" if self.low is None or self.high is None else f"{self.low:.{digits}f}, {self.high:.{digits}f}"
        return f"{self.value:.{digits}f} [{interval}]"

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of `value`."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def share(scores: Sequence[float]) -> Estimate:
    """The mean of scores between 0 and 1, with Wilson's interval (1927), which holds at 0 of n and n of n, too.

    Scores between 0 and 1 vary less than 0s and 1s of the same mean, so for them the interval is wider than it need be.
    Raises ValueError for no scores or one outside 0 to 1.
    """
    values = _checked(scores, "scores")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"scores lie between {values.min()} and {values.max()}: wanted 0 to 1; `mean` takes any number")
    n, p, z = len(values), float(values.mean()), NORMAL_95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean with Student's interval; without one for a single value. For paired differences, give the differences."""
    found = _checked(values, "values")
    return _around(float(found.mean()), found - found.mean())


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum(numerators) / sum(denominators) over independent units, such as the nats and the bytes of documents.

    Long documents weigh more than short ones, and tokens within one are no independent sample: the interval is Student's
    over the units' residuals n_i - r d_i, the first-order error of a ratio (Cochran, Sampling Techniques, section 6.4).
    Raises ValueError for no units, unequal numbers of them, or denominators that are not above 0 in sum.
    """
    top, bottom = _checked(numerators, "numerators"), _checked(denominators, "denominators")
    if len(top) != len(bottom) or bottom.sum() <= 0:
        raise ValueError(f"{len(top)} numerators, {len(bottom)} denominators of sum {bottom.sum()}: wanted pairs, above 0")
    value = float(top.sum() / bottom.sum())
    return _around(value, (top - value * bottom) / bottom.mean())


def change_of_ratio(before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> Estimate:
    """How much `ratio` has changed between two models that were asked the same units, each a (numerator, denominator).

    Unit by unit, a hard document is hard for both models: the interval of the difference is far narrower than those of the
    two ratios. Raises ValueError for unequal numbers of units.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"{len(before)} and {len(after)} units: wanted the same ones, one at least")
    values, residuals = [], []
    for units in (before, after):
        top, bottom = np.asarray(units, dtype=np.float64).T
        values.append(float(top.sum() / bottom.sum()))
        residuals.append((top - values[-1] * bottom) / bottom.mean())
    return _around(values[1] - values[0], residuals[1] - residuals[0])


def _checked(values: Sequence[float], name: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{name} are of shape {found.shape}: wanted one finite number at least, in one row")
    return found


def _around(value: float, residuals: np.ndarray) -> Estimate:
    n = len(residuals)
    if n == 1:
        return Estimate(value, None, None, 1)
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(float((residuals**2).sum()) / (n - 1) / n)
    return Estimate(value, value - half, value + half, n)
