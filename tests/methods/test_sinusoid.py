"""The table of sines and cosines: the formula entry by entry, and the shift that is a rotation."""

from __future__ import annotations

import math

import pytest
import torch

from ropepatch.errors import OptionError
from ropepatch.methods._sinusoid import sinusoid_table


def test_every_entry_is_the_formulas() -> None:
    table = sinusoid_table(torch.arange(50), 128)
    assert table.dtype == torch.float32 and tuple(table.shape) == (50, 128)
    for p in (0, 1, 17, 49):
        for i in range(64):
            angle = p / 10000 ** (2 * i / 128)
            assert float(table[p, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[p, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_halves_hold_the_same_numbers_in_another_order() -> None:
    pairs, halves = (sinusoid_table(torch.arange(9), 16, base=500.0, layout=way) for way in ("interleaved", "halves"))
    assert halves[:, :8].equal(pairs[:, 0::2])
    assert halves[:, 8:].equal(pairs[:, 1::2])


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_a_shift_is_one_rotation_for_all_positions(shift: int) -> None:
    positions = torch.arange(200)
    here, there = (sinusoid_table(p, 32).double() for p in (positions, positions + shift))
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    rotation = torch.zeros(32, 32, dtype=torch.float64)
    for i, f in enumerate(frequencies.tolist()):
        c, s = math.cos(shift * f), math.sin(shift * f)
        rotation[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, s], [-s, c]])
    torch.testing.assert_close(here @ rotation.T, there, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dim", "layout"), [(3, "interleaved"), (0, "halves"), (4, "pairs")])
def test_what_has_no_table_is_refused(dim: int, layout: str) -> None:
    with pytest.raises(OptionError):
        sinusoid_table(torch.arange(2), dim, layout=layout)
