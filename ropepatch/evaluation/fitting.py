"""How a prompt gets its exact length: its filler is cut where the count comes out right.

The text is tokenised as a whole and measured, and the amount of filler moved until the count is right. Where no amount
gives exactly that count (a tokenizer may fuse a full stop with a newline, a unit of filler may be many tokens), the
last tokens of its spare part are taken out of the id list instead; everything else is untouched. Either way the ids
that were counted are the ids that are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ropepatch.evaluation.prompt import TextEncoder, Tokens

_SEARCH_STEPS = 8

Span = tuple[int, int]


@dataclass(frozen=True)
class Draft:
    """A prompt's text, with the places that matter as character spans.

    Attributes:
        text: what is tokenised.
        spare: the part whose last tokens may be taken out.
        marks: further places, by name.
    """

    text: str
    spare: Span
    marks: Mapping[str, Span] = field(default_factory=dict)


class Fitted(NamedTuple):
    """A prompt of exactly the wanted length, its draft, and the units of filler in it (a good guess for the next)."""

    tokens: Tokens
    draft: Draft
    units: int


def fit(
    encoder: TextEncoder,
    length: int,
    draft: Callable[[int], Draft],
    *,
    guess: int,
    most: int,
    tokens_per_unit: float = 1.0,
) -> Fitted | None:
    """The draft that has exactly `length` tokens.

    Args:
        length: wanted tokens.
        draft: the text with so many units of filler; more units give more tokens.
        guess: units to begin with.
        most: the most units there are.
        tokens_per_unit: about how many tokens one more unit adds.

    Returns:
        None where neither an amount of filler nor its spare part gives this length.
    """
    tried: dict[int, tuple[Tokens, Draft]] = {}

    def measure(units: int) -> int:
        if units not in tried:
            made = draft(units)
            tried[units] = (encoder.encode(made.text), made)
        return len(tried[units][0])

    units = fewest(measure, length, guess=guess, most=most, tokens_per_unit=tokens_per_unit)
    surplus = measure(units) - length
    tokens, made = tried[units]
    spare = tokens.inside(*made.spare)
    if not 0 <= surplus <= len(spare):
        return None
    keep = np.delete(np.arange(len(tokens)), spare[len(spare) - surplus :])
    return Fitted(Tokens(tokens.ids[keep], tokens.starts[keep], tokens.ends[keep]), made, units)


def fewest(measure: Callable[[int], int], length: int, *, guess: int, most: int, tokens_per_unit: float = 1.0) -> int:
    """The least amount of filler that gives at least `length` tokens; `most` where none does.

    Args:
        measure: the tokens of a prompt with so many units of filler; asked several times for the same amount.
        length, guess, most, tokens_per_unit: as for `fit`.
    """
    tried: set[int] = set()
    units = guess
    for _ in range(_SEARCH_STEPS):
        units = min(max(units, 0), most)
        if units in tried:
            break
        tried.add(units)
        missing = length - measure(units)
        if not missing:
            break
        step = max(1, round(abs(missing) / tokens_per_unit))
        units += step if missing > 0 else -step
    # From wherever the search ended to the least filler that reaches the length: the same whatever the guess was.
    units = max((u for u in tried if measure(u) <= length), default=0)
    while units < most and measure(units) < length:
        units += 1
    while units > 0 and measure(units - 1) >= length:
        units -= 1
    return units
