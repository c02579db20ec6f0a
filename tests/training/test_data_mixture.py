"""Mixtures: every source's share is right over every prefix."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.training.data.mixture import allot
from ropepatch.training.data.plan import Place, Plan

WEIGHTS = st.lists(st.floats(0.01, 50).map(lambda w: round(w, 2)), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(1, 300))
def test_every_prefix_holds_the_shares_to_within_one_row(weights: list[float], rows: int) -> None:
    sources, numbers = allot(weights, rows)
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    counts = [0] * len(weights)
    for row in range(rows):
        assert numbers[row] == counts[sources[row]]
        counts[sources[row]] += 1
        for count, share in zip(counts, shares, strict=True):
            assert floor((row + 1) * share) <= count <= ceil((row + 1) * share)


@given(WEIGHTS, st.integers(1, 100), st.integers(0, 100))
def test_the_first_rows_do_not_depend_on_how_many_follow(weights: list[float], rows: int, more: int) -> None:
    short, long = allot(weights, rows), allot(weights, rows + more)
    for a, b in zip(short, long, strict=True):
        np.testing.assert_array_equal(a, b[:rows])


def test_only_the_ratio_of_weights_counts() -> None:
    np.testing.assert_array_equal(allot([1, 2], 50)[0], allot([0.1, 0.2], 50)[0])
    assert allot([3, 1], 8)[0].tolist().count(0) == 6


def test_where_a_row_stands() -> None:
    plan = Plan((2, 3), (8, 16))
    assert [plan.place(row) for row in (0, 1, 2, 4)] == [(0, 0, 8), (0, 1, 8), (1, 0, 16), (1, 2, 16)]
    assert plan.place(4) == Place(1, 2, 16)
    with pytest.raises(IndexError):
        plan.place(5)
