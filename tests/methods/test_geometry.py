"""What a rotary site may look like."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from geometries import odd_sites, site, sites
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.errors import OptionError
from ropepatch.methods._base import RotaryGeometry, periods


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 7, "head_dim": 8}, "in pairs"),
        ({"rotary_dim": 0}, "in pairs"),
        ({"rotary_dim": 8, "head_dim": 6}, "more rotated dimensions"),
        ({"inv_freq": torch.ones(3)}, "does not fit rotary_dim"),
        ({"inv_freq": torch.ones(4, 1)}, "does not fit rotary_dim"),
        ({"inv_freq": torch.ones(4, dtype=torch.bfloat16)}, "does not fit rotary_dim"),
        ({"inv_freq": torch.tensor([1.0, math.nan, 0.1, 0.1])}, "finite and not negative"),
        ({"inv_freq": torch.tensor([1.0, -0.5, 0.1, 0.1])}, "finite and not negative"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"original_length": 0}, "trained length"),
    ],
)
def test_impossible_sites_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "inv_freq": torch.ones(4),
        "rope_theta": 1e4,
        "rotary_dim": 8,
        "head_dim": 8,
        "original_length": 64,
    }
    RotaryGeometry(**good)
    with pytest.raises(OptionError, match=f"(?i){message}"):
        RotaryGeometry(**{**good, **change})


def test_still_planes_and_partial_rotary_are_possible() -> None:
    assert site(8, head_dim=10).rotary_dim == 8
    RotaryGeometry(torch.tensor([1.0, 0.0]), 1e4, 4, 4, 64)


@given(sites(2))
def test_periods_of_the_plain_series_are_its_own_in_float32(geometry: RotaryGeometry) -> None:
    exponents = torch.arange(0, geometry.rotary_dim, 2).float() / geometry.rotary_dim
    assert torch.equal(periods(geometry), geometry.rope_theta**exponents)
    assert torch.equal(1 / periods(geometry), geometry.inv_freq)


@given(sites(2), st.data())
def test_one_ulp_off_the_series_is_another_series(geometry: RotaryGeometry, data: st.DataObject) -> None:
    plane = data.draw(st.integers(0, geometry.rotary_dim // 2 - 1))
    inv_freq = geometry.inv_freq.clone()
    inv_freq[plane] = torch.nextafter(inv_freq[plane], torch.tensor(0.0))
    period = periods(dataclasses.replace(geometry, inv_freq=inv_freq))
    assert period.dtype == torch.float64
    assert torch.equal((1 / period).float(), inv_freq)


@given(odd_sites())
def test_periods_of_any_frequencies_lead_back_to_them(geometry: RotaryGeometry) -> None:
    assert torch.equal((1 / periods(geometry)).float(), geometry.inv_freq)
