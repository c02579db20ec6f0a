"""p-RoPE: the slowest planes stop turning and carry content only."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ropepatch.errors import OptionError
from ropepatch.methods._base import (
    MAX_FACTOR,
    Frequencies,
    MethodOptions,
    RotaryGeometry,
    frequency_method,
    scaled_length,
)


class ProportionalOptions(MethodOptions):
    """Options of `proportional`, named as in transformers."""

    partial_rotary_factor: float = Field(
        gt=0, le=1, description="share of the planes that keep turning (p), the fastest ones"
    )
    factor: float = Field(
        default=1.0,
        ge=1,
        le=MAX_FACTOR,
        description="target length / trained length; what keeps turning is divided by it",
    )


@frequency_method(
    "proportional",
    aliases=("p_rope",),
    options=ProportionalOptions,
    paper="arXiv 2410.06205",
    summary="stop the slowest planes, divide the others by the factor",
    rope_type="proportional",
)
def proportional(geometry: RotaryGeometry, options: ProportionalOptions) -> Frequencies:
    """f_i / s for i < p d / 2, else 0. The exponents of the kept planes stay -2i/d with the full d.

    With partial rotary, p is a share of the rotated dimensions, and transformers has no word for it.

    Raises:
        OptionError: p leaves no plane turning.
    """
    kept = int(options.partial_rotary_factor * geometry.rotary_dim // 2)
    if kept == 0:
        raise OptionError(
            "no plane would keep turning",
            given=f"partial_rotary_factor={options.partial_rotary_factor:g} of {geometry.rotary_dim} dimensions",
            allowed=f">= {2 / geometry.rotary_dim:g}",
        )
    inv_freq = (geometry.inv_freq.double() / options.factor).float()
    inv_freq[kept:] = 0.0
    return Frequencies(
        inv_freq=inv_freq,
        target_length=scaled_length(geometry, options.factor),
        rope_parameters=_native(options) if geometry.rotary_dim == geometry.head_dim else None,
    )


def _native(options: ProportionalOptions) -> dict[str, Any]:
    return {"rope_type": "proportional", **options.model_dump(exclude_defaults=True)}
