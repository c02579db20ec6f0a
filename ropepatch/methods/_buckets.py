"""What a method of the relative-bias mechanism needs: what it does to a distance before it is bucketed.

Models of this mechanism (T5 and its kin, MPNet, DeBERTa, CPM-Ant) learn a number for each bucket of distances; XLNet
turns each distance into sines and cosines. No distance is out of range: all beyond the largest share one bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ropepatch.methods._base import METHODS, MethodOptions


@dataclass(frozen=True)
class Buckets:
    """What becomes of distances.

    Attributes:
        divisor: distances are divided by it, and rounded towards zero, before they are bucketed.
        stretch: the distance at which the last bucket begins is multiplied by it.
    """

    divisor: float = 1.0
    stretch: float = 1.0


@dataclass(frozen=True)
class BucketMethod:
    """A registered method of the relative-bias mechanism. `compute` is the pure function from its options."""

    name: str
    aliases: tuple[str, ...]
    options: type[MethodOptions]
    compute: Callable[[Any], Buckets]
    paper: str
    summary: str
    rope_type: None = None
    mechanisms: tuple[str, ...] = ("relative_bias",)
    becomes: None = None
    table: None = None
    seam: ClassVar[str] = "attention"


def bucket_method(
    name: str,
    *,
    options: type[MethodOptions],
    paper: str,
    summary: str,
    aliases: tuple[str, ...] = (),
) -> Callable[[Callable[[Any], Buckets]], Callable[[Any], Buckets]]:
    """Register the decorated function as a method, as `frequency_method` does."""

    def register(compute: Callable[[Any], Buckets]) -> Callable[[Any], Buckets]:
        METHODS.register(name, aliases=aliases)(BucketMethod(name, aliases, options, compute, paper, summary))
        return compute

    return register


def divided(distance: Tensor, divisor: float) -> Tensor:
    """|distance| / divisor rounded down, with the sign of the distance; whole numbers in, whole numbers out."""
    if divisor == 1:
        return distance
    shrunk = (distance.abs().double() / divisor).floor().to(distance.dtype)
    return shrunk * distance.sign()
