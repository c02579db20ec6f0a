"""Giraffe's truncated basis: no plane meets an angle in use that it did not see in training."""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator

from ropepatch.methods._base import FactorOptions, Frequencies, RotaryGeometry, frequency_method, scaled_length


class TruncatedOptions(FactorOptions):
    """Options of `truncated`. Wavelengths are counted in trained lengths."""

    cutoff: float = Field(
        default=1.0, gt=0, description="planes with a wavelength up to this many trained lengths are left alone (b)"
    )
    zero_from: float = Field(
        default=8.0, gt=0, description="planes with a wavelength above this many trained lengths stop turning (a)"
    )
    rho: float = Field(default=16.0, gt=0, description="the planes between all get this wavelength, in trained lengths")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.cutoff <= self.zero_from:
            raise ValueError(f"cutoff={self.cutoff:g} must not exceed zero_from={self.zero_from:g}")
        if self.rho < self.cutoff:
            raise ValueError(f"rho={self.rho:g} must not be below cutoff={self.cutoff:g}")
        return self


@frequency_method(
    "truncated",
    options=TruncatedOptions,
    paper="arXiv 2308.10882",
    summary="keep planes that complete a turn in training, slow the next to one small frequency, stop the rest",
)
def truncated(geometry: RotaryGeometry, options: TruncatedOptions) -> Frequencies:
    """f_i where f_i >= b, rho where a <= f_i < b, 0 below; b = 2 pi / L, a = b / 8, rho = b / 16 by default.

    The paper has no factor: the frequencies are the same for every one above 1, and `factor` states the
    target length. At factor 1 no unseen angle is to be avoided, and nothing changes.
    """
    base = geometry.inv_freq.double()
    turn = 2 * math.pi / geometry.original_length  # one turn over the trained length
    kept = torch.where(base < turn / options.cutoff, turn / options.rho, base)
    kept = torch.where(base < turn / options.zero_from, 0.0, kept)
    return Frequencies(
        inv_freq=geometry.inv_freq.clone() if options.factor == 1 else kept.float(),
        target_length=scaled_length(geometry, options.factor),
    )
