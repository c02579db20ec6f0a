"""RULER's scores of one reply: its formulas, for a single trial and in 0..1."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocessed(reply: str) -> str:
    """The reply as RULER scores it: control characters become line ends, white space at both ends is dropped."""
    return _CONTROL.sub("\n", reply.strip()).strip()


def string_match_all(reply: str, references: Sequence[str]) -> float:
    """The share of the references that the reply contains, whatever their case."""
    return sum(_contains(reply, reference) for reference in references) / len(references)


def string_match_part(reply: str, references: Sequence[str]) -> float:
    """1 where the reply contains any of the references, whatever their case."""
    return float(any(_contains(reply, reference) for reference in references))


def _contains(reply: str, reference: str) -> bool:
    return reference.lower() in reply.lower()
