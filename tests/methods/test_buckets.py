"""Dividing distances: towards zero, whole numbers, no change at 1."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.methods._base import METHODS
from ropepatch.methods._buckets import Buckets, divided
from ropepatch.methods._options import parse_options


@given(st.lists(st.integers(-(2**30), 2**30), min_size=1, max_size=20), st.floats(1, 1e6))
def test_divided(distances: list[int], divisor: float) -> None:
    found = divided(torch.tensor(distances), divisor)
    assert found.dtype == torch.int64
    assert found.tolist() == [int(math.copysign(math.floor(abs(d) / divisor), d)) for d in distances]


def test_log_buckets_only_stretches() -> None:
    method = METHODS.get("log_buckets")
    assert method.compute(parse_options(method, {"factor": 4})) == Buckets(divisor=1, stretch=4)
