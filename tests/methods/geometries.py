"""Rotary sites as they occur, drawn for property tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from ropepatch.methods._base import METHODS, Frequencies, RotaryGeometry
from ropepatch.methods._options import parse_options

ROUNDING = 2.0**-24
"""The largest relative error of one float32 rounding: half an ulp of a number just above a power of two."""
FACTORS = st.one_of(st.sampled_from([1.5, 2.0, 4.0, 8.0, 32.0]), st.floats(1.01, 40.0))


def site(rotary_dim: int = 64, theta: float = 1e4, length: int = 2048, head_dim: int | None = None) -> RotaryGeometry:
    """A site with the frequencies that transformers computes in float32."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return RotaryGeometry(
        inv_freq=1.0 / (theta**exponents),
        rope_theta=theta,
        rotary_dim=rotary_dim,
        head_dim=head_dim or rotary_dim,
        original_length=length,
    )


@st.composite
def sites(draw: st.DrawFn, smallest_dim: int = 4) -> RotaryGeometry:
    """Even rotary dims, whole or partial heads, bases and lengths of real models."""
    rotary_dim = 2 * draw(st.integers(smallest_dim // 2, 64))
    head_dim = draw(st.sampled_from([rotary_dim, 2 * rotary_dim, rotary_dim + 2]))
    theta = draw(st.one_of(st.sampled_from([1e4, 1e5, 5e5, 1e6]), st.floats(500.0, 1e7)))
    length = draw(st.one_of(st.sampled_from([512, 2048, 4096, 8192, 32768]), st.integers(64, 131072)))
    return site(rotary_dim, theta, length, head_dim)


@st.composite
def odd_sites(draw: st.DrawFn) -> RotaryGeometry:
    """Sites whose frequencies follow no formula, as after another scaling, some planes standing still."""
    geometry = draw(sites())
    values = draw(
        st.lists(
            st.floats(0, 2, width=32, allow_subnormal=False),
            min_size=geometry.rotary_dim // 2,
            max_size=geometry.rotary_dim // 2,
        )
    )
    return dataclasses.replace(geometry, inv_freq=torch.tensor(sorted(values, reverse=True)))


def compute(name: str, geometry: RotaryGeometry, **options: Any) -> Frequencies:
    """What the method called `name` makes of a site, options validated as in `patch`."""
    method = METHODS.get(name)
    return method.compute(geometry, parse_options(method, options))


def factor_options(name: str, geometry: RotaryGeometry, factor: float) -> dict[str, Any]:
    """Options that bring the method called `name` to `factor` and leave the rest at its default."""
    if name == "longrope":
        # Divisors grow from 1 to the factor, as a search ends up with.
        divisors = torch.linspace(1.0, factor, geometry.rotary_dim // 2, dtype=torch.float64).tolist()
        return {"factor": factor, "short_factor": [1.0] * len(divisors), "long_factor": divisors}
    if name == "proportional":
        return {"factor": factor, "partial_rotary_factor": 1.0}
    return {"factor": factor}
