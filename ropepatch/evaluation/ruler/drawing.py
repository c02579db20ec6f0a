"""A stream of random numbers that is the same on every machine and with every version of Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from ropepatch.evaluation.draws import draw_number

T = TypeVar("T")


class Draw:
    """Random choices for one purpose.

    Only `random()` is used of Python's generator: of all its methods it alone promises the same numbers for ever.

    Args:
        what: what the numbers are for; equal purposes give equal streams.
    """

    def __init__(self, *what: object) -> None:
        self.random = random.Random(draw_number(2**256, *what)).random

    def below(self, n: int) -> int:
        """A number from 0 to n - 1; n at most 2^50."""
        return int(self.random() * n)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def word(self, alphabet: str, letters: int) -> str:
        """A word of so many letters."""
        return "".join(self.choice(alphabet) for _ in range(letters))

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in another order (Fisher and Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def sample(self, n: int, k: int) -> list[int]:
        """k different numbers from 0 to n - 1, in random order."""
        return self.shuffled(range(n))[:k]
