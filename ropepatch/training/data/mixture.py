"""Which source each row comes from: shares by weight, exact to within one row over every prefix of the run."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def allot(weights: Sequence[float], rows: int) -> tuple[Numbers, Numbers]:
    """The source of every row, and the row's number among the rows of its source.

    The quota method (Balinski and Young, 1975): after n rows a source of share p has either floor(n p) or ceil(n p) of
    them. The first rows do not depend on how many follow.

    Args:
        weights: positive, of any sum.
        rows: how many rows.

    Returns:
        sources int64 [rows], numbers int64 [rows].
    """
    # In whole numbers: rounding must not decide a tie differently on another machine.
    shares = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(share.denominator for share in shares))
    parts = [int(share * scale) for share in shares]
    whole = sum(parts)
    sources = np.zeros(rows, dtype=np.int64)
    numbers = np.arange(rows, dtype=np.int64)
    if len(parts) > 1:
        # How long a source can wait between two rows of its own, in whole numbers.
        pace = [lcm(*parts) // part for part in parts]
        taken = [0] * len(parts)
        for row in range(rows):
            # Those whose next row would not lift them over their share rounded up; of these, the most overdue.
            open_ = [k for k, part in enumerate(parts) if taken[k] * whole < (row + 1) * part]
            chosen = min(open_, key=lambda k: (taken[k] + 1) * pace[k])
            sources[row], numbers[row] = chosen, taken[chosen]
            taken[chosen] += 1
    return sources, numbers
