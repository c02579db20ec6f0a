"""The fixed table of sines and cosines, in the layouts that models use.

Source: Attention Is All You Need, arXiv 1706.03762, section 3.5.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ropepatch.errors import OptionError

SinusoidLayout = Literal["interleaved", "halves"]


def sinusoid_table(
    positions: Tensor, dim: int, *, base: float = 10000.0, layout: SinusoidLayout = "interleaved"
) -> Tensor:
    """Rows sin(p / base^(2i/dim)), cos(p / base^(2i/dim)), i = 0 .. dim/2 - 1.

    Args:
        positions: [n], whole or fractional tokens.
        dim: size of a row; even.
        base: of the geometric series of wavelengths, 2 pi to 2 pi x base.
        layout: "interleaved" as in the paper (sin at 2i, cos at 2i + 1), or "halves" (all sines, then all cosines).

    Returns:
        [n, dim], float32; computed in float64.

    Raises:
        OptionError: an odd or too small `dim`, or an unknown layout.
    """
    if dim < 2 or dim % 2:
        raise OptionError("sines and cosines come in pairs", given=dim, allowed="an even number, at least 2")
    frequencies = float(base) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions.double()[:, None] * frequencies
    if layout == "interleaved":
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).float()
    if layout == "halves":
        return torch.cat((angle.sin(), angle.cos()), dim=-1).float()
    raise OptionError("unknown layout of sines and cosines", given=layout, allowed=("interleaved", "halves"))
