"""Llama 3.1's scaling: by parts, with the ends stated as fractions of the trained length."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ropepatch.methods._base import (
    FactorOptions,
    Frequencies,
    RotaryGeometry,
    blend,
    frequency_method,
    rotations,
    scaled_length,
)


class Llama3Options(FactorOptions):
    """Options of `llama3`."""

    low_freq_factor: float = Field(
        default=1.0, gt=0, description="wavelengths above trained length / this are divided by the whole factor"
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, description="wavelengths below trained length / this are left alone"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} must be below high_freq_factor={self.high_freq_factor:g}"
            )
        return self


@frequency_method(
    "llama3",
    options=Llama3Options,
    paper="arXiv 2407.21783; transformers",
    summary="interpolate long wavelengths, keep short ones, smooth between; no gain",
    rope_type="llama3",
)
def llama3(geometry: RotaryGeometry, options: Llama3Options) -> Frequencies:
    """(1 - m_i) f_i / s + m_i f_i with m_i = (L / wavelength_i - low) / (high - low) cut to [0, 1]."""
    base = geometry.inv_freq.double()
    low, high = options.low_freq_factor, options.high_freq_factor
    # L / wavelength is the number of turns over the trained length.
    smooth = ((rotations(geometry) - low) / (high - low)).clamp(0, 1)
    return Frequencies(
        inv_freq=blend(base / options.factor, base, smooth).float(),
        target_length=scaled_length(geometry, options.factor),
        rope_parameters={
            "rope_type": "llama3",
            "factor": options.factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
        },
    )
