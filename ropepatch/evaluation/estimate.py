"""How long a run will take: the model's pace on a short text, and a line that says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ropepatch.evaluation.trie import token_cost

WORTH_SAYING = 20.0
"""Seconds: a run that is expected to take less is not announced."""

_SHORT = 16
_LONGEST = 1024
_PATIENCE = 3.0


@dataclass(frozen=True)
class Pace:
    """How fast a model reads.

    Attributes:
        per_forward: seconds of a call, however few tokens it reads.
        per_token: seconds of a token without attention, the unit of `token_cost`.
    """

    per_forward: float
    per_token: float

    def seconds(self, forwards: float, work: float) -> float:
        """What so many calls take that together do this work, in units of `token_cost`."""
        return forwards * self.per_forward + work * self.per_token


def measure_pace(
    read: Callable[[int], object],
    longest: int,
    quadratic: float,
    *,
    patience: float = _PATIENCE,
    clock: Callable[[], float] = time.perf_counter,
) -> Pace:
    """Time a model on its first tokens: a few, then more and more as long as it stays quick.

    The attention of so short a text is lost in the noise of any clock, so its share is weighed by arithmetic.

    Args:
        read: reads the first n tokens of a text in one call, and is done when it returns.
        longest: tokens of that text.
        quadratic: as for `token_cost`.
        patience: seconds that it may take after a first reading, which warms up; a second may take longer.
        clock: the time in seconds.
    """

    def timed(tokens: int) -> float:
        began = clock()
        read(tokens)
        return clock() - began

    def work(tokens: int) -> float:
        return token_cost(0, tokens, quadratic=quadratic)

    short = min(_SHORT, longest)
    cold = timed(short)  # starting up, or weights that are read from a disk, may be most of it
    began = clock()
    quick = min(cold, timed(short))
    few = work(short)
    # Until there are two lengths, a call is taken to cost nothing by itself.
    tokens, slow, pace = short, quick, Pace(0.0, quick / few)
    while tokens < min(longest, _LONGEST):
        more = min(4 * tokens, longest, _LONGEST)
        if clock() - began + pace.seconds(1, work(more)) > patience:
            break
        tokens, slow = more, timed(more)
        per_token = min(max(0.0, slow - quick) / (work(tokens) - few), slow / work(tokens))
        pace = Pace(max(0.0, quick - per_token * few), per_token)
    return pace


def announcement(trials: int, tokens: int, seconds: float) -> str:
    """What is about to be computed, in one line."""
    return f"{trials:,} trial{'' if trials == 1 else 's'}, {tokens:,} tokens to compute: {about(seconds)}"


def about(seconds: float) -> str:
    """A duration as exactly as an estimate deserves: "about 40 seconds", "about 15 minutes", "about 2.5 hours"."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 95:
        return _words(max(10, round(seconds, -1)), "second")
    if minutes < 95:
        return _words(round(minutes) if minutes < 10 else 5 * round(minutes / 5), "minute")
    return _words(round(2 * hours) / 2 if hours < 10 else round(hours), "hour")


def _words(count: float, unit: str) -> str:
    return f"about {count:g} {unit}{'' if count == 1 else 's'}"
