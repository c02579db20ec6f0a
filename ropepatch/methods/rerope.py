"""ReRoPE: distances are exact up to a window and stand still beyond it."""

from __future__ import annotations

import torch
from pydantic import Field

from ropepatch.attention.scheme import Scheme, Segment, everything, own, static
from ropepatch.methods._attention import LayerGeometry, SchemeOptions, attention_method
from ropepatch.methods._reach import half_window


class ReropeOptions(SchemeOptions):
    """Options of `rerope`."""

    window: int | None = Field(
        default=None,
        ge=1,
        description="w, tokens: smaller distances are exact, all others are w; by default half of the trained length",
    )


@attention_method(
    "rerope",
    options=ReropeOptions,
    paper="Su Jianlin, kexue.fm/archives/9708 (2023)",
    summary="exact distances within a window, one constant distance beyond it",
)
def rerope(layer: LayerGeometry, options: ReropeOptions) -> Scheme:
    """The distance of (i, j) is min(i - j, w). There is no limit of length.

    A far pair needs the query at w and the key at 0: keys beyond the window are used as they are.

    Equal to the published code (bojone/rerope) with `logn=true`: that code always scales by log n.

    Raises:
        OptionError: a window above the trained length.
    """
    w = half_window(layer, options.window, layer.length)
    return Scheme(
        static(
            Segment(lambda i: i - w + 1, own, own, own, "own"),
            Segment(everything, lambda i: i - w, lambda i: torch.full_like(i, w), None, "raw"),
        )
    )
