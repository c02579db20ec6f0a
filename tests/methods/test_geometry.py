"""What a rotary site may look like."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from geometries import site

from ropepatch.errors import OptionError
from ropepatch.methods._base import RotaryGeometry


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
