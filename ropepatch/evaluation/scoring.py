"""What a grid of trials says: an interval for every share, and how far the model reaches. No dependencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ropepatch.errors import OptionError

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""

RULER_THRESHOLD = 0.856
"""RULER's bar (arXiv 2404.06654): the score of Llama-2-7B at 4k, below which a length does not count as reached."""

SELF_RELATIVE_SHARE = 0.85
"""NoLiMa's bar (arXiv 2502.05167): a length counts while it keeps 85 % of the model's own short-context score."""


def wilson_interval(successes: float, n: int, *, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, 1927), 95 % by default.

    Args:
        successes: sum of the scores, 0 to `n`; need not be whole (a trial may score a part).
        n: number of trials. 0 trials say nothing: the interval is (0, 1).
        z: normal quantile of the wanted level.

    Returns:
        (low, high), both in 0..1.
    """
    if n < 0 or not 0 <= successes <= n:
        raise OptionError("successes must lie between 0 and the number of trials", given=(successes, n))
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    spread = z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # Exact at both ends, where rounding would leave 1e-17 of dust.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def effective_length(by_length: Sequence[Mapping[str, Any]], *, threshold: float = RULER_THRESHOLD) -> int | None:
    """RULER's effective length: the largest tested length that passes together with all shorter tested ones.

    A length passes when its mean `accuracy` is above `threshold`. A length that passes after a shorter one failed
    does not count: the model does not reach it reliably.

    Args:
        by_length: one mapping a tested length, with `length` (tokens) and `accuracy` (0..1), in any order.

    Returns:
        The length in tokens, or None when the shortest one fails already (or nothing was tested).
    """
    return _reach(by_length, lambda accuracy: accuracy > threshold)


def self_relative_length(by_length: Sequence[Mapping[str, Any]], *, share: float = SELF_RELATIVE_SHARE) -> int | None:
    """NoLiMa's effective length: as `effective_length`, but a length passes when it keeps `share` of the model's own
    score at the shortest tested length.

    Returns:
        The length in tokens, or None when the model scores 0 at its shortest length: nothing to keep a share of.
    """
    if not by_length:
        return None
    base = min(by_length, key=lambda row: row["length"])["accuracy"]
    if base <= 0:
        return None
    # The tolerance keeps an accuracy of exactly the share (17 of 20 against 1.0) from failing by rounding.
    return _reach(by_length, lambda accuracy: accuracy >= share * base - 1e-12)


def _reach(by_length: Sequence[Mapping[str, Any]], passes: Callable[[float], bool]) -> int | None:
    reached: int | None = None
    for row in sorted(by_length, key=lambda row: row["length"]):
        if not passes(row["accuracy"]):
            break
        reached = int(row["length"])
    return reached
