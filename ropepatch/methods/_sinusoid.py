"""The fixed table of sines and cosines, in the layouts that models use.

Source: Attention Is All You Need, arXiv 1706.03762, section 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Sinusoid:
    """How a model computes its table: row r holds the sines and cosines of r times each frequency.

    Attributes:
        layout: see `sinusoid_table`; both halves or pairs.
        cosine_first: cosines come before sines (MusicGen).
        to_base: the last wavelength is 2 pi x base, as in tensor2tensor (M2M100, XGLM, Whisper); in the paper it stays
            one step below.
        base: of the series.
        scale, shift: every number is multiplied by the one, then the other is added (PatchTST).
    """

    layout: SinusoidLayout = "interleaved"
    cosine_first: bool = False
    to_base: bool = False
    base: float = 10000.0
    scale: float = 1.0
    shift: float = 0.0

    def rows(self, at: Tensor, dim: int) -> Tensor:
        """Rows for whole or fractional row numbers `at` [n]: [n, dim], float32, computed in float64."""
        half = dim // 2
        step = half - 1 if self.to_base else half
        frequencies = float(self.base) ** (-torch.arange(half, dtype=torch.float64) / max(step, 1))
        angle = at.double()[:, None] * frequencies
        parts = (angle.cos(), angle.sin()) if self.cosine_first else (angle.sin(), angle.cos())
        joined = torch.cat(parts, dim=-1) if self.layout == "halves" else torch.stack(parts, dim=-1).flatten(-2)
        return (joined * self.scale + self.shift).float()


_KNOWN = tuple(
    Sinusoid(layout, cosine_first, to_base)
    for layout in ("interleaved", "halves")
    for cosine_first in (False, True)
    for to_base in (False, True)
)
# float32 angles of a few thousand, as models compute them, are off by some 1e-4; half precision rounds rows.
_CLOSE = {torch.float32: 2e-3, torch.float64: 2e-3}
_CLOSE_HALF = 2e-2


def law_of(table: Tensor) -> Sinusoid | None:
    """The law that a table [rows, dim] was computed by, or None. Rows of zeros (padding) are passed over."""
    if table.shape[-1] < 4 or table.shape[-1] % 2:
        return None
    close = _CLOSE.get(table.dtype, _CLOSE_HALF)
    rows = table.detach().float().cpu()
    numbers = rows.abs().sum(-1).nonzero().squeeze(-1)
    if len(numbers) < 2:
        return None
    for law in _KNOWN:
        if torch.allclose(law.rows(numbers, rows.shape[-1]), rows[numbers], rtol=0, atol=close):
            return law
    return None


def scaled_law_of(table: Tensor) -> Sinusoid | None:
    """As `law_of`, for rows that were shifted and scaled as a whole: both numbers are those of least squares."""
    if table.dim() != 2 or table.shape[0] < 2 or table.shape[-1] < 4 or table.shape[-1] % 2:
        return None
    close = _CLOSE.get(table.dtype, _CLOSE_HALF)
    rows = table.detach().double().cpu()
    for law in _KNOWN:
        plain = law.rows(torch.arange(len(rows)), rows.shape[-1]).double()
        spread = plain - plain.mean()
        scale = float((spread * rows).sum() / spread.square().sum())
        shift = float(rows.mean() - scale * plain.mean())
        if scale > 0 and torch.allclose(plain * scale + shift, rows, rtol=0, atol=close * scale):
            return replace(law, scale=scale, shift=shift)
    return None
