"""Statistics of paired scores: two runs answered the same trials, and the question is how much they differ.

Pairing matters: the trials differ far more from each other than two runs do on one trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ropepatch.errors import DependencyError
from ropepatch.evaluation.scoring import wilson_interval

RESAMPLES = 9999
SEED = 0


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact p-value of McNemar's test: `gained` and `lost` as heads and tails of a fair coin.

    Quinn McNemar, Psychometrika 12, 1947. With no trial on which the runs differ the value is 1.
    """
    n = gained + lost
    tail: int = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    # Whole numbers up to the division: exact for any n.
    return min(1.0, 2 * tail / 2**n)


def newcombe_interval(both: int, gained: int, lost: int, neither: int) -> Interval:
    """95 % interval of a difference of two shares that were measured on the same trials.

    R. G. Newcombe, Statistics in Medicine 17, 1998, 2635-2650, method 10: the Wilson intervals of the two shares, put
    together with their correlation.

    Args:
        both, gained, lost, neither: trials that both runs get right, only the second, only the first, and neither.

    Returns:
        (low, high) of the second run's share less the first's. Without trials: (-1, 1).
    """
    n = both + gained + lost + neither
    if n == 0:
        return Interval(-1.0, 1.0)
    second, first = both + gained, both + lost
    low, high = wilson_interval(second, n)
    base_low, base_high = wilson_interval(first, n)
    below, above = second / n - low, high - second / n
    base_below, base_above = first / n - base_low, base_high - first / n
    phi = _correlation(both, gained, lost, neither)
    difference = (gained - lost) / n
    down = math.sqrt(max(0.0, below**2 - 2 * phi * below * base_above + base_above**2))
    up = math.sqrt(max(0.0, above**2 - 2 * phi * above * base_below + base_below**2))
    return Interval(max(-1.0, difference - down), min(1.0, difference + up))


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """The phi coefficient of a two by two table, where positive with Newcombe's continuity correction."""
    n = both + gained + lost + neither
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if product == 0:
        return 0.0
    determinant: float = both * neither - gained * lost
    if determinant > 0:
        determinant = max(determinant - n / 2, 0.0)
    return determinant / math.sqrt(product)


def bootstrap_interval(differences: Sequence[float], weights: Sequence[float]) -> Interval | None:
    """95 % bootstrap interval of a weighted mean of differences (bias-corrected and accelerated, seeded).

    Args:
        differences: one for each trial.
        weights: of the trials, positive.

    Returns:
        None where all differences are equal: resampling them says nothing.

    Raises:
        DependencyError: scipy is not installed.
    """
    if len(set(differences)) < 2:
        return None
    try:
        from scipy import stats
    except ImportError as error:
        raise DependencyError(
            "differences of scores in parts need scipy", hint="run: pip install 'ropepatch[eval]'"
        ) from error
    import numpy as np

    weight = np.asarray(weights, dtype=np.float64)
    weighted = np.asarray(differences, dtype=np.float64) * weight
    found = stats.bootstrap(
        (weighted, weight),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        method="BCa",
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def sign_flip_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of a paired permutation test: which of the two runs got which score is flipped, trial by trial.

    R. A. Fisher, The Design of Experiments, 1935, section 21. For scores of 0 and 1 it is McNemar's exact test. Exact
    up to 13 trials on which the runs differ; beyond, from 9,999 seeded draws.

    Args:
        first, second: the scores of each trial, weighted where trials count differently.
    """
    import numpy as np

    differences = np.asarray([b - a for a, b in zip(first, second, strict=True) if a != b], dtype=np.float64)
    n = len(differences)
    exact = 2**n <= RESAMPLES
    if exact:
        flips = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        flips = np.random.default_rng(SEED).integers(0, 2, (RESAMPLES, n), dtype=np.int8)
    observed = abs(differences.sum())
    sums = np.abs(differences.sum() - 2 * (flips @ differences))
    # Sums that are equal but for rounding are equal.
    extreme = int((sums >= observed - 1e-12 * np.abs(differences).sum()).sum())
    # What was observed is one of the possible flips: exact, it is among them; drawn, it is added to them.
    return extreme / len(sums) if exact else (extreme + 1) / (len(sums) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, in the same order: S. Holm, Scandinavian Journal of Statistics 6, 1979.

    Whoever calls those below 0.05 real differences is wrong about any of them with a probability of at most 5 %.
    """
    adjusted = [0.0] * len(p_values)
    reached = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = reached
    return adjusted
