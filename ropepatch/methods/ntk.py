"""NTK-aware scaling: the base is raised so that the lowest frequency is interpolated and the highest kept."""

from __future__ import annotations

import torch

from ropepatch.errors import OptionError
from ropepatch.methods._base import (
    FactorOptions,
    Frequencies,
    RotaryGeometry,
    frequency_method,
    rebased,
    scaled_length,
)


@frequency_method(
    "ntk",
    aliases=("ntk_aware",),
    options=FactorOptions,
    paper="arXiv 2309.00071, section 3.1 (bloc97, 2023)",
    summary="raise the base: the lowest frequency is divided by the factor, the highest kept",
)
def ntk(geometry: RotaryGeometry, options: FactorOptions) -> Frequencies:
    """f_i s^(-2i/(d-2)), which is theta s^(d/(d-2)) as the base.

    Planes in the middle are stretched by less than s, so the reach falls short of s L: a larger factor than
    the wanted one is customary.

    Raises:
        OptionError: rotary_dim is 2: one plane cannot be both kept and interpolated.
    """
    d = geometry.rotary_dim
    if d == 2:
        raise OptionError("ntk needs at least two planes", given=f"rotary_dim={d}", hint="use linear")
    index = torch.arange(d // 2, dtype=torch.float64)
    stretch = torch.pow(torch.tensor(options.factor, dtype=torch.float64), 2 * index / (d - 2))
    rope_theta = geometry.rope_theta * options.factor ** (d / (d - 2))
    return Frequencies(
        inv_freq=rebased(geometry, rope_theta, stretch),
        target_length=scaled_length(geometry, options.factor),
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
