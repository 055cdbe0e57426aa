"""pass@k and pass^k: is one of k answers right, are all of them? Unbiased, from n >= k answers of which c were right."""

import math

from minglm.evals.measure import EvaluationError


def pass_at(k: int, n: int, c: int) -> float:
    """The chance that k of the n answers, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k)
    (Chen et al., arXiv 2107.03374, equation 1)."""
    _check(k, n, c)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_all(k: int, n: int, c: int) -> float:
    """pass^k: the chance that all k are right, C(c, k) / C(n, k) (tau-bench, arXiv 2406.12045, section 4)."""
    _check(k, n, c)
    return math.comb(c, k) / math.comb(n, k)


def ks_of(n: int) -> list[int]:
    """Which k are shown for n answers: 2, 4, 8, ... and n itself."""
    return sorted({n, *(2**power for power in range(1, n.bit_length()) if 2**power <= n)} - {1})


def _check(k: int, n: int, c: int) -> None:
    if not 1 <= k <= n or not 0 <= c <= n:
        raise EvaluationError(f"k = {k}, n = {n}, c = {c}: wanted 1 <= k <= n answers, 0 to n of them right")
