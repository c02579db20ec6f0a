"""Position interpolation: every frequency divided by the factor."""

from __future__ import annotations

from ropepatch.methods._base import FactorOptions, Frequencies, RotaryGeometry, frequency_method, scaled_length


@frequency_method(
    "linear",
    aliases=("pi",),
    options=FactorOptions,
    paper="arXiv 2306.15595",
    summary="divide every frequency, slope or bucketed distance by the factor",
    rope_type="linear",
    mechanisms=("rotary", "alibi", "relative_bias"),
)
def linear(geometry: RotaryGeometry, options: FactorOptions) -> Frequencies:
    """f_i / s. Crowds the high frequencies: weak without finetuning."""
    return Frequencies(
        inv_freq=geometry.inv_freq / options.factor,
        target_length=scaled_length(geometry, options.factor),
        rope_parameters={"rope_type": "linear", "factor": options.factor},
    )
