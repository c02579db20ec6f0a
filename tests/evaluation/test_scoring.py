"""Intervals against scipy's, effective lengths against their definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.errors import OptionError
from ropepatch.evaluation.scoring import effective_length, self_relative_length, wilson_interval


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case: tuple[int, int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    successes, n = case
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_perfect_scores() -> None:
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(50, 50)[0] == pytest.approx(0.93, abs=2e-3)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.floats(0, 20))
def test_wilson_holds_the_share_for_partial_scores(successes: float) -> None:
    low, high = wilson_interval(successes, 20)
    assert 0 <= low <= successes / 20 <= high <= 1


@pytest.mark.parametrize("case", [(-1, 5), (6, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(case: tuple[int, int]) -> None:
    with pytest.raises(OptionError):
        wilson_interval(*case)


def _grid(*accuracies: float) -> list[dict[str, float]]:
    return [{"length": 1000 * (i + 1), "accuracy": accuracy} for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((1.0, 0.9, 0.86, 0.5), 3000),
        ((1.0, 0.5, 1.0), 1000),  # what passes behind a failure does not count
        ((0.856, 1.0), None),  # above the bar, not at it
        ((), None),
    ],
)
def test_effective_length(accuracies: tuple[float, ...], expected: int | None) -> None:
    assert effective_length(_grid(*accuracies)[::-1]) == expected


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.6, 0.51, 0.5), 2000),  # 85 % of 0.6 is 0.51
        ((1.0, 0.85, 0.84), 2000),
        ((0.0, 1.0), None),
        ((), None),
    ],
)
def test_self_relative_length(accuracies: tuple[float, ...], expected: int | None) -> None:
    assert self_relative_length(_grid(*accuracies)) == expected
