"""Leaky ReRoPE: distances are exact up to a window and grow k times slower beyond it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ropepatch.attention.scheme import Scheme, Segment, everything, own, rotated, static
from ropepatch.methods._attention import LayerGeometry, attention_method
from ropepatch.methods._base import MAX_FACTOR
from ropepatch.methods._reach import ReachOptions, divisor, reach, window_of


class LeakyReropeOptions(ReachOptions):
    """Options of `leaky_rerope`: `k` or `factor`, not both."""

    divisor: ClassVar[str] = "k"

    k: float | None = Field(default=None, ge=1, le=MAX_FACTOR, description="divisor of what a distance exceeds w by")


@attention_method(
    "leaky_rerope",
    options=LeakyReropeOptions,
    paper="Su Jianlin, kexue.fm/archives/9708 (2023)",
    summary="exact distances within a window, k times slower ones beyond it",
    target=reach,
)
def leaky_rerope(layer: LayerGeometry, options: LeakyReropeOptions) -> Scheme:
    """The distance of (i, j) is w + (i - j - w) / k where i - j >= w. Reaches w + (L - w) k tokens.

    Positions beyond the window are fractions, in float32: the query at (i + w (k - 1)) / k, the key at j / k.

    Equal to the published code (bojone/rerope) with `logn=true`: that code always scales by log n.

    Raises:
        OptionError: a window that is not below the trained length.
    """
    w, k = window_of(layer, options), divisor(layer, options)
    if k == 1:
        return rotated()
    return Scheme(
        static(
            Segment(lambda i: i - w + 1, own, own, own, "own"),
            Segment(
                everything,
                lambda i: i - w,
                lambda i: (i.float() + w * (k - 1)) / k,
                lambda j: j.float() / k,
                "leaky",
            ),
        )
    )
