"""Llama 3.1's scaling: by parts, with the ends stated as fractions of the trained length."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ropepatch.methods._base import FactorOptions, Frequencies, RotaryGeometry, frequency_method, scaled_length
from ropepatch.methods._ramp import scaled_by_turns


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
    """(1 - m_i) f_i / s + m_i f_i with m_i = (L / wavelength_i - low) / (high - low) cut to [0, 1].

    float32 throughout, to the last bit as in transformers; at factor 1, where transformers may be off by a rounding,
    the identity.
    """
    low, high = options.low_freq_factor, options.high_freq_factor
    return Frequencies(
        inv_freq=scaled_by_turns(geometry, options.factor, low, high),
        target_length=scaled_length(geometry, options.factor),
        rope_parameters={
            "rope_type": "llama3",
            "factor": options.factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
        },
    )
