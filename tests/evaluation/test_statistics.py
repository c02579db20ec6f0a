"""Statistics of paired scores, against scipy, brute force and published examples."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.evaluation.statistics import (
    bootstrap_interval,
    holm,
    mcnemar_exact,
    newcombe_interval,
    sign_flip_test,
)

stats = pytest.importorskip("scipy.stats", reason="oracles are scipy's")

SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(gained=st.integers(0, 300), lost=st.integers(0, 300))
def test_mcnemar_is_a_two_sided_binomial_test(gained: int, lost: int) -> None:
    oracle = 1.0 if gained + lost == 0 else stats.binomtest(gained, gained + lost, 0.5).pvalue
    assert mcnemar_exact(gained, lost) == pytest.approx(oracle, rel=1e-9)
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Newcombe 1998, table III: the published limits of method 10 for 36, 12, 2, 0.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        # Bentur et al. 2009, as worked out by Fagerland, Lydersen and Laake, BMC Med. Res. Methodol. 13:91, 2013.
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_newcombes_interval_as_published(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert newcombe_interval(*table) == pytest.approx((low, high), abs=6e-4)


def test_newcombes_interval_covers_what_it_says() -> None:
    """The exact coverage: every table of 12 trials, weighted by its probability, over a grid of true shares."""
    n, coverages = 12, []
    tables = [t for t in itertools.product(range(n + 1), repeat=3) if sum(t) <= n]
    intervals = {t: newcombe_interval(*t, n - sum(t)) for t in tables}
    for both, gained, lost in [(0.5, 0.2, 0.1), (0.3, 0.3, 0.05), (0.7, 0.1, 0.1), (0.1, 0.5, 0.2), (0.8, 0.1, 0.02)]:
        chances = stats.multinomial(n, [both, gained, lost, 1 - both - gained - lost])
        inside = (low <= gained - lost <= high for low, high in intervals.values())
        coverages.append(sum(chances.pmf([*t, n - sum(t)]) for t, holds in zip(tables, inside, strict=True) if holds))
    assert min(coverages) > 0.93
    assert sum(coverages) / len(coverages) == pytest.approx(0.955, abs=0.02)


@given(counts=st.tuples(*[st.integers(0, 30)] * 4))
def test_newcombes_interval_holds_the_difference_and_mirrors(counts: tuple[int, int, int, int]) -> None:
    both, gained, lost, neither = counts
    low, high = newcombe_interval(both, gained, lost, neither)
    n = sum(counts)
    assert -1 <= low <= (gained - lost) / n if n else 0 <= high <= 1
    assert newcombe_interval(both, lost, gained, neither) == pytest.approx((-high, -low))


@given(pairs=st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=9))
def test_sign_flips_are_every_exchange_of_the_runs(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    observed = abs(sum(b - a for a, b in pairs))
    sums = [
        abs(sum(sign * (b - a) for sign, (a, b) in zip(signs, pairs, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(pairs))
    ]
    oracle = sum(value >= observed - 1e-12 for value in sums) / len(sums)
    assert sign_flip_test(first, second) == pytest.approx(oracle)


@given(pairs=st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 2), min_size=1, max_size=12))
def test_sign_flips_of_right_and_wrong_are_mcnemars(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    gained, lost = (sum(sign * (b - a) > 0 for a, b in pairs) for sign in (1, -1))
    assert sign_flip_test(first, second) == pytest.approx(mcnemar_exact(gained, lost))


def test_many_sign_flips_are_drawn_with_a_seed() -> None:
    first, second = [0.0] * 40, [math.sin(7 * i) + 0.15 for i in range(40)]
    found = sign_flip_test(first, second)
    assert found == sign_flip_test(first, second)
    oracle = stats.permutation_test(
        (first, second),
        lambda a, b, axis: (b - a).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        random_state=1,
    ).pvalue
    assert found == pytest.approx(oracle, abs=0.03)
    # The normal approximation of the same test.
    spread = math.sqrt(sum(b * b for b in second))
    assert found == pytest.approx(2 * stats.norm.sf(abs(sum(second)) / spread), abs=0.015)


@pytest.mark.parametrize(("pairs", "p"), [([], 1.0), ([(0.0, 1.0)], 1.0), ([(0.3, 0.3)] * 5, 1.0)])
def test_nothing_to_flip_says_nothing(pairs: list[tuple[float, float]], p: float) -> None:
    assert sign_flip_test([a for a, _ in pairs], [b for _, b in pairs]) == p


def test_bootstrap_interval_is_near_students_and_seeded() -> None:
    differences = [math.sin(7 * i) + 0.3 for i in range(60)]
    low, high = bootstrap_interval(differences, [1.0] * 60)  # type: ignore[misc]
    oracle = stats.t.interval(0.95, 59, loc=sum(differences) / 60, scale=stats.sem(differences))
    assert (low, high) == pytest.approx(oracle, abs=0.02)
    assert (low, high) == bootstrap_interval(differences, [1.0] * 60)


def test_bootstrap_weights_count() -> None:
    differences, weights = [0.0, 1.0] * 20, [1.0, 3.0] * 20
    low, high = bootstrap_interval(differences, weights)  # type: ignore[misc]
    assert low < 0.75 < high
    assert (low + high) / 2 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("differences", [[0.5], [0.25, 0.25, 0.25]])
def test_equal_differences_have_no_bootstrap_interval(differences: list[float]) -> None:
    assert bootstrap_interval(differences, [1.0] * len(differences)) is None


def test_holm_steps_down() -> None:
    # Worked by hand: 0.01 * 4, max(0.015 * 3, 0.04), 0.03 * 2, max(0.04 * 1, 0.06).
    assert holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float]) -> None:
    adjusted = holm(values)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for step, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
            if values[index] * (len(values) - step) >= level:
                break
            rejected.add(index)
        assert {index for index, value in enumerate(adjusted) if value < level} == rejected
