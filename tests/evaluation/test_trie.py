"""The walk against a trie that is really built."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.evaluation.prompt import Ids
from ropepatch.evaluation.trie import common_prefix, shares, token_cost, trie_size, walk

_SEQUENCES = st.lists(
    st.lists(st.sampled_from([0, 1, 255, 256, 65536]), min_size=1, max_size=8), min_size=1, max_size=12
)


def _ids(sequences: list[list[int]]) -> list[Ids]:
    return [np.asarray(s, dtype=np.int32) for s in sequences]


@given(_SEQUENCES)
def test_every_distinct_prefix_is_met_once(sequences: list[list[int]]) -> None:
    visits = walk(_ids(sequences))
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert trie_size(visits) == len(prefixes)
    assert sorted(i for v in visits for i in v.members) == list(range(len(sequences)))
    computed: set[tuple[int, ...]] = set()
    previous: list[int] = []
    for visit in visits:
        sequence = sequences[visit.members[0]]
        assert all(sequences[i] == sequence for i in visit.members)
        assert visit.length == len(sequence)
        assert sequence[: visit.shared] == previous[: visit.shared]
        new = {tuple(sequence[: n + 1]) for n in range(visit.shared, len(sequence))}
        assert not new & computed
        computed |= new
        previous = sequence
    assert computed == prefixes


@given(_SEQUENCES, st.integers(1, 5))
def test_shares_cover_everything_in_runs(sequences: list[list[int]], parts: int) -> None:
    visits = walk(_ids(sequences))
    split = shares(visits, parts, quadratic=0.01)
    assert len(split) == parts
    assert [i for part in split for i in part] == [i for v in visits for i in v.members]


def test_shares_are_balanced_by_work() -> None:
    # One long prompt and thirty short ones of the same work together.
    sequences = [[i, *range(100, 119)] for i in range(30)] + [[50, *range(1000, 1599)]]
    first, second = shares(walk(_ids(sequences)), 2, quadratic=0.0)
    assert sorted(map(len, (first, second))) == [1, 30]


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1))
def test_cost_counts_pairs(start: int, more: int, quadratic: float) -> None:
    expected = sum(1 + quadratic * (position + 1) for position in range(start, start + more))
    assert abs(token_cost(start, start + more, quadratic=quadratic) - expected) < 1e-6


def test_common_prefix() -> None:
    a, b = _ids([[1, 2, 3], [1, 2, 4, 5]])
    assert common_prefix(a, b) == 2
    assert common_prefix(a, a) == 3
    assert common_prefix(a, a[:1]) == 1
