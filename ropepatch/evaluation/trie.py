"""Which tokens a set of sequences has in common, and an order that computes each of them once.

Sorted sequences are a depth-first walk over their prefix tree: what a sequence shares with any earlier one, it shares
with the one just before it. So one cache that is cut back and extended suffices, and the tree is never built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ropepatch.evaluation.prompt import Ids


@dataclass(frozen=True)
class Visit:
    """One stop of the walk.

    Attributes:
        members: indices of the sequences that end here (more than one when they are identical).
        shared: tokens in common with the stop before.
        length: tokens of the sequence.
    """

    members: tuple[int, ...]
    shared: int
    length: int


def walk(sequences: Sequence[Ids]) -> list[Visit]:
    """The order in which to compute `sequences` so that common prefixes are met in a row."""
    groups: dict[bytes, list[int]] = {}
    for index, sequence in enumerate(sequences):
        # Big-endian bytes sort as the numbers do.
        groups.setdefault(np.ascontiguousarray(sequence, dtype=">u4").tobytes(), []).append(index)
    visits: list[Visit] = []
    before: Ids = np.empty(0, dtype=np.int32)
    for _, members in sorted(groups.items()):
        sequence = sequences[members[0]]
        visits.append(Visit(tuple(members), common_prefix(before, sequence), len(sequence)))
        before = sequence
    return visits


def common_prefix(a: Ids, b: Ids) -> int:
    """The number of leading tokens that two sequences have in common."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if differing.size else n


def trie_size(visits: Sequence[Visit]) -> int:
    """The number of distinct prefixes: tokens that must be computed when each is computed once."""
    return sum(visit.length - visit.shared for visit in visits)


def token_cost(start: int, end: int, *, quadratic: float) -> float:
    """The work of computing the tokens at positions start..end, in units of one token without attention.

    Args:
        quadratic: work of one query-key pair over all layers, in the same unit.
    """
    pairs = (end * (end + 1) - start * (start + 1)) / 2
    return (end - start) + quadratic * pairs


def shares(visits: Sequence[Visit], parts: int, *, quadratic: float) -> list[list[int]]:
    """Split the walk into runs of about equal work, one for each process; indices of sequences.

    A run is contiguous, so that prefixes stay together: only the first prefix of each run is computed twice.
    """
    costs = [token_cost(visit.shared, visit.length, quadratic=quadratic) for visit in visits]
    total, done = sum(costs), 0.0
    result: list[list[int]] = [[] for _ in range(parts)]
    for visit, cost in zip(visits, costs, strict=True):
        # The middle of a visit's work decides whose it is.
        part = min(parts - 1, int((done + cost / 2) / total * parts)) if total else 0
        result[part].extend(visit.members)
        done += cost
    return result
