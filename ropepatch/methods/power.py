"""Giraffe's power basis: lower frequencies are slowed by a power of their rank."""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator

from ropepatch.errors import OptionError
from ropepatch.methods._base import (
    MAX_FACTOR,
    Frequencies,
    MethodOptions,
    RotaryGeometry,
    frequency_method,
    implied_length,
    scaled_length,
)


class PowerOptions(MethodOptions):
    """Options of `power`: at least one of the two."""

    power: float | None = Field(
        default=None, ge=0, description="the exponent k; by default the one that divides the lowest frequency by factor"
    )
    factor: float | None = Field(
        default=None, ge=1, le=MAX_FACTOR, description="target length / trained length; by default (d/2)^power"
    )

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if self.power is None and self.factor is None:
            raise ValueError("give power (the exponent), factor (target length / trained length) or both")
        return self


@frequency_method(
    "power",
    options=PowerOptions,
    paper="arXiv 2308.10882",
    summary="slow each frequency by (1 - 2i/d)^k: low ones most, the highest not at all",
)
def power(geometry: RotaryGeometry, options: PowerOptions) -> Frequencies:
    """f_i (1 - 2i/d)^k.

    The paper gives k alone. The lowest frequency is divided by (d/2)^k, and that ties k to a length here:
    `factor` alone takes k = ln s / ln(d/2), `power` alone aims at (d/2)^k L, and with both `factor` only
    states the target length.

    Raises:
        OptionError: rotary_dim is 2: the only plane would stay as it is; or `power` alone implies an absurd length.
    """
    planes = geometry.rotary_dim // 2
    if planes == 1:
        raise OptionError("power needs at least two planes", given="rotary_dim=2", hint="use linear")
    exponent = options.power
    if exponent is None:
        assert options.factor is not None  # the schema demands one of the two
        exponent = math.log(options.factor) / math.log(planes)
    rank = 1 - torch.arange(planes, dtype=torch.float64) / planes
    return Frequencies(
        inv_freq=(geometry.inv_freq.double() * torch.pow(rank, exponent)).float(),
        target_length=scaled_length(geometry, options.factor)
        if options.factor is not None
        else implied_length(geometry, exponent * math.log(planes)),
    )
