"""Pieces that methods share: YaRN's correction range, its ramp over planes and its gain, and the ramp over turns.

Source: arXiv 2309.00071 and transformers' `_compute_yarn_parameters` and `_compute_llama3_parameters`, which are
followed to the letter in corner cases and in what they round, so that an exported config means the same frequencies.
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


def index_ramp(geometry: RotaryGeometry, low: float, high: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """0 up to plane `low`, 1 from plane `high` on, linear in the index between; `dtype`, [rotary_dim / 2]."""
    width = high - low if high != low else 0.001
    index = torch.arange(geometry.rotary_dim // 2, dtype=dtype)
    return ((index - low) / width).clamp(0, 1)


def scaled_by_turns(geometry: RotaryGeometry, factor: float, slow: float, fast: float) -> Tensor:
    """(1 - m_i) f_i / s + m_i f_i, float32, shape [rotary_dim / 2].

    m_i = (r_i - slow) / (fast - slow) cut to [0, 1], r_i the turns of plane i over the trained length. All in float32
    and in the order of transformers' `llama3`, so that the plain series becomes what transformers makes of it, to the
    last bit. At factor 1 the identity.
    """
    base, length = geometry.inv_freq, geometry.original_length
    if factor == 1:
        # The two shares of a plane on the ramp need not add up to it: rounding would break the identity.
        return base.clone()
    wavelengths = 2 * math.pi / base
    weight = (length / wavelengths - slow) / (fast - slow)
    mixed = (1 - weight) * base / factor + weight * base
    # Outside of the ramp no mixture: planes are f or f / s without its rounding.
    mixed = torch.where(wavelengths > length / slow, base / factor, mixed)
    return torch.where(wavelengths < length / fast, base, mixed)


def yarn_gain(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, the gain on cos and on sin."""
    return 0.1 * mscale * math.log(factor) + 1.0
