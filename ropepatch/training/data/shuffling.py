"""Orders that follow from a seed and a name alone, on every machine and with every version of numpy."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def permutation(count: int, *what: object) -> npt.NDArray[np.int64]:
    """An order of 0 .. count - 1, int64 [count], drawn from a hash of `what` it is for.

    Raw bits of a counter generator, sorted: numpy keeps those the same for ever, its own shuffling it does not.
    """
    digest = hashlib.sha256("|".join(map(str, what)).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(count)
    return np.argsort(bits, kind="stable")
