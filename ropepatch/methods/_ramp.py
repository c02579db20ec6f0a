"""YaRN's pieces, shared by the methods that build on it: the correction range, the ramp over planes, the gain.

Source: arXiv 2309.00071 and transformers' `_compute_yarn_parameters`, which is followed to the letter in the
corner cases so that an exported config means the same frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ropepatch.methods._base import RotaryGeometry


def correction_dim(rotations: float, geometry: RotaryGeometry) -> float:
    """The (fractional) index of the plane that turns `rotations` times over the trained length."""
    length = geometry.original_length / (rotations * 2 * math.pi)
    return geometry.rotary_dim * math.log(length) / (2 * math.log(geometry.rope_theta))


def correction_range(
    geometry: RotaryGeometry, beta_fast: float, beta_slow: float, truncate: bool
) -> tuple[float, float]:
    """First and last plane of the ramp: (index turning beta_fast times, index turning beta_slow times).

    Args:
        geometry: the site.
        beta_fast: rotations above which a plane is left alone.
        beta_slow: rotations below which a plane is fully interpolated.
        truncate: widen both ends to whole indices.
    """
    low, high = correction_dim(beta_fast, geometry), correction_dim(beta_slow, geometry)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, geometry.rotary_dim - 1)


def index_ramp(geometry: RotaryGeometry, low: float, high: float) -> Tensor:
    """0 up to plane `low`, 1 from plane `high` on, linear in the index between; float64, [rotary_dim / 2]."""
    width = high - low if high != low else 0.001
    index = torch.arange(geometry.rotary_dim // 2, dtype=torch.float64)
    return ((index - low) / width).clamp(0, 1)


def yarn_gain(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, the gain on cos and on sin."""
    return 0.1 * mscale * math.log(factor) + 1.0
