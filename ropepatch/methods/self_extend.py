"""Self-Extend: exact distances nearby, positions in groups beyond."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from ropepatch.attention.scheme import Scheme, Segment, everything, own, rotated, static
from ropepatch.methods._attention import LayerGeometry, attention_method, floor_div
from ropepatch.methods._reach import ReachOptions, divisor, reach, window_of


class SelfExtendOptions(ReachOptions):
    """Options of `self_extend`: `group` or `factor`, not both."""

    divisor: ClassVar[str] = "group"

    group: int | None = Field(
        default=None, ge=1, description="group size G, tokens that share a position beyond the window"
    )


@attention_method(
    "self_extend",
    options=SelfExtendOptions,
    paper="arXiv 2401.01325",
    summary="exact distances within a window, positions in groups of G beyond it",
    target=reach,
)
def self_extend(layer: LayerGeometry, options: SelfExtendOptions) -> Scheme:
    """Where i - j >= W, the query stands at floor(i / G) + W - floor(W / G) and the key at floor(j / G).

    Reaches (L - W) G + W tokens by the paper's count. Where G does not divide W, the last W mod G of them meet the
    distance L at the first keys, one more than was trained.

    Equal to the published code (datamllab/LongLM) where G divides W; elsewhere some of its paths leave out the floor of
    W / G, and differ from its others. Its `scale_base` is `logn`.

    Raises:
        OptionError: a window that is not below the trained length.
    """
    # Rounded up: (L - W) G + W >= target.
    w, g = window_of(layer, options), math.ceil(divisor(layer, options))
    if g == 1:
        return rotated()
    return Scheme(
        static(
            Segment(lambda i: i - w + 1, own, own, own, "own"),
            Segment(
                everything,
                lambda i: i - w,
                lambda i: floor_div(i, g) + (w - w // g),
                lambda j: floor_div(j, g),
                "grouped",
            ),
        )
    )
