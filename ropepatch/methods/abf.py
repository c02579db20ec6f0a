"""Adjusted base frequency: a larger rope_theta, given as it is or derived from the target length."""

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
    rebased,
    scaled_length,
)

# A million times the largest base in use.
_MAX_THETA = 1e15


class AbfOptions(MethodOptions):
    """Options of `abf`: at least one of the two."""

    rope_theta: float | None = Field(
        default=None,
        gt=1,
        le=_MAX_THETA,
        description="the new base, not below the current one; by default what factor calls for",
    )
    factor: float | None = Field(
        default=None,
        ge=1,
        le=MAX_FACTOR,
        description="target length / trained length; by default what rope_theta reaches",
    )

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if self.rope_theta is None and self.factor is None:
            raise ValueError("give rope_theta (the new base), factor (target length / trained length) or both")
        return self


@frequency_method(
    "abf",
    options=AbfOptions,
    paper="arXiv 2309.16039; arXiv 2310.05209",
    summary="raise rope_theta, to a number or as far as the target length calls for",
)
def abf(geometry: RotaryGeometry, options: AbfOptions) -> Frequencies:
    """f_i (theta' / theta)^(-2i/d).

    The last plane to complete a turn in training has the index i with 2 pi theta^(2i/d) = L. `factor` alone
    raises the base until that plane takes the target length for one turn: theta' = theta^(ln(s L / 2 pi) /
    ln(L / 2 pi)), so no slower plane meets an angle it has not seen. `rope_theta` alone reaches by the same law
    2 pi (L / 2 pi)^(ln theta' / ln theta) tokens, which is the target length then. With both, `rope_theta`
    is the base and `factor` only states the target length.

    Raises:
        OptionError: rope_theta is below the current one, or the trained length is too short for the law.
    """
    ratio = _ratio(geometry, options)
    exponents = torch.arange(geometry.rotary_dim // 2, dtype=torch.float64) * 2 / geometry.rotary_dim
    stretch = torch.pow(torch.tensor(ratio, dtype=torch.float64), exponents)
    rope_theta = options.rope_theta or geometry.rope_theta * ratio
    return Frequencies(
        inv_freq=rebased(geometry, rope_theta, stretch),
        target_length=_target(geometry, options),
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )


def _ratio(geometry: RotaryGeometry, options: AbfOptions) -> float:
    """theta' / theta."""
    if options.rope_theta is not None:
        if options.rope_theta < geometry.rope_theta:
            raise OptionError(
                "a smaller rope_theta shortens the reach",
                given=options.rope_theta,
                allowed=f">= {geometry.rope_theta:g}, the current one",
            )
        return options.rope_theta / geometry.rope_theta
    assert options.factor is not None  # the schema demands one of the two
    exponent = math.log(geometry.rope_theta) * math.log(options.factor) / _log_turn(geometry)
    if exponent > math.log(_MAX_THETA):
        raise OptionError(
            "the trained length is so short that the law calls for an absurd base",
            given=f"e^{exponent:.4g} times {geometry.rope_theta:g}",
            hint="pass both rope_theta and factor",
        )
    return math.exp(exponent)


def _target(geometry: RotaryGeometry, options: AbfOptions) -> int:
    if options.factor is not None:
        return scaled_length(geometry, options.factor)
    assert options.rope_theta is not None
    growth = math.log(options.rope_theta) / math.log(geometry.rope_theta)
    return implied_length(geometry, (growth - 1) * _log_turn(geometry))


def _log_turn(geometry: RotaryGeometry) -> float:
    """ln(L / 2 pi)."""
    if geometry.original_length <= 2 * math.pi:
        raise OptionError(
            "no plane completes a turn within the trained length, so base and length are not tied",
            given=geometry.original_length,
            allowed="7 tokens or more",
            hint="pass both rope_theta and factor",
        )
    return math.log(geometry.original_length / (2 * math.pi))
