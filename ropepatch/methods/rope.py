"""Rotary positions for a model that has none: queries and keys are rotated, and its slopes or its table go."""

from __future__ import annotations

import torch
from pydantic import Field

from ropepatch.attention.scheme import Rotary, Scheme, rotated
from ropepatch.errors import OptionError
from ropepatch.methods._attention import LayerGeometry, attention_method
from ropepatch.methods._swap import SwapOptions, swap_rule


class RopeOptions(SwapOptions):
    """Options of `rope`."""

    rope_theta: float = Field(
        default=10000.0, gt=1, le=1e15, description="base of the frequencies: plane i turns by rope_theta^(-2i/d)"
    )
    rotary_dim: int | None = Field(
        default=None, ge=2, description="d, dimensions of a head that are rotated, the first ones; by default all"
    )


@attention_method(
    "rope",
    aliases=("rotary",),
    options=RopeOptions,
    paper="arXiv 2104.09864",
    summary="no slopes, no position table; queries and keys are rotated, as in LLaMA",
    becomes="rotary",
    mechanisms=("alibi", "learned", "sinusoidal"),
    table=swap_rule("factor"),
)
def rope(layer: LayerGeometry, options: RopeOptions) -> Scheme:
    """Plane i, the dimensions i and i + d/2, turns by the position times rope_theta^(-2i/d).

    Raises:
        OptionError: rotated dimensions that are odd in number, or more than the head has.
    """
    dims = layer.head_dim if options.rotary_dim is None else options.rotary_dim
    if dims % 2 or dims > layer.head_dim:
        raise OptionError(
            "rotary_dim does not fit the heads, whose dimensions are rotated in pairs",
            given=dims,
            allowed=f"an even number from 2 to {layer.head_dim}",
        )
    exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
    return rotated(Rotary(options.rope_theta**-exponents), both_ways=layer.both_ways)
