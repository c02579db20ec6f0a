"""LongRoPE: one searched divisor a plane."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from ropepatch.errors import OptionError
from ropepatch.methods._base import (
    FactorOptions,
    Frequencies,
    RotaryGeometry,
    divided,
    frequency_method,
    periods,
    scaled_length,
)

# strict=False: a list is as good as a tuple; its numbers are still checked strictly.
Divisors = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]


class LongRopeOptions(FactorOptions):
    """Options of `longrope`, named as in transformers."""

    short_factor: Divisors = Field(description="divisor of each plane for inputs up to the trained length, d/2 numbers")
    long_factor: Divisors = Field(description="divisor of each plane for longer inputs, d/2 numbers")
    use: Literal["long", "short"] = Field(default="long", description="which of the two lists is in force")
    attention_factor: float | None = Field(
        default=None, gt=0, description="gain on cos and sin; by default sqrt(1 + ln(factor) / ln(trained length))"
    )


@frequency_method(
    "longrope",
    options=LongRopeOptions,
    paper="arXiv 2402.13753",
    summary="divide each frequency by its own searched divisor; gain sqrt(1 + ln(factor) / ln(trained length))",
    rope_type="longrope",
)
def longrope(geometry: RotaryGeometry, options: LongRopeOptions) -> Frequencies:
    """f_i / lambda_i with lambda the list named by `use`, whatever the length of the input.

    transformers itself chooses the list in every call, by the largest position in it: the whole batch flips
    strictly past the trained length, and keys cached before the flip no longer fit. Here the choice is
    static: one list for all lengths, so cached and full runs agree. The config is written so that plain
    transformers does the same: the list in force stands in both places.

    Where the site's frequencies are the plain series of its rope_theta, this is float32 throughout and to the last
    bit what transformers gives for that list. Other frequencies are divided in float64 and rounded once.

    Raises:
        OptionError: a list has not rotary_dim / 2 numbers, or the gain is undefined at this trained length.
    """
    planes = geometry.rotary_dim // 2
    wrong = {
        name: len(divisors)
        for name, divisors in (("short_factor", options.short_factor), ("long_factor", options.long_factor))
        if len(divisors) != planes
    }
    if wrong:
        raise OptionError(
            "longrope needs one divisor a plane",
            given=", ".join(f"{name} of {count}" for name, count in wrong.items()),
            allowed=f"lists of {planes} numbers",
        )
    divisors = options.long_factor if options.use == "long" else options.short_factor
    gain = _gain(geometry, options)
    return Frequencies(
        inv_freq=divided(periods(geometry), divisors),
        target_length=scaled_length(geometry, options.factor),
        attention_scaling=gain,
        rope_parameters={
            "rope_type": "longrope",
            "factor": options.factor,
            "short_factor": list(divisors),
            "long_factor": list(divisors),
            "attention_factor": gain,
        },
    )


def _gain(geometry: RotaryGeometry, options: LongRopeOptions) -> float:
    if options.attention_factor is not None:
        return options.attention_factor
    if geometry.original_length < 2:
        raise OptionError(
            "longrope's gain divides by the logarithm of the trained length",
            given=geometry.original_length,
            hint="pass attention_factor",
        )
    return math.sqrt(1 + math.log(options.factor) / math.log(geometry.original_length))
