"""Rows between rows: straight lines and Keys' cubics against closed forms, and tables of sines read by their law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepatch.errors import OptionError
from ropepatch.methods._interpolation import interpolated, resized
from ropepatch.methods._sinusoid import Sinusoid
from ropepatch.methods._tables import PositionTable
from ropepatch.methods.linear import LinearOptions, stretched
from ropepatch.methods.nope import NopeOptions, zeros


def random_rows(length: int = 12, dim: int = 6) -> torch.Tensor:
    return torch.randn(length, dim, generator=torch.Generator().manual_seed(0))


@given(st.integers(2, 30), st.floats(1, 9))
@settings(max_examples=40)
def test_row_p_is_the_old_table_at_p_over_s(length: int, factor: float) -> None:
    rows = random_rows(length, 3)
    new = stretched(PositionTable(rows), round(length * factor), LinearOptions(factor=factor))
    for p in range(len(new)):
        at = min(p / factor, length - 1)
        low = int(at)
        share = at - low
        wanted = [
            (1 - share) * float(rows[low, i]) + share * float(rows[min(low + 1, length - 1), i]) for i in range(3)
        ]
        assert new[p].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_the_old_rows_stay_to_the_last_bit(interpolation: str) -> None:
    rows = random_rows()
    assert stretched(PositionTable(rows), 12, LinearOptions(factor=1, interpolation=interpolation)).equal(rows)
    assert stretched(PositionTable(rows), 48, LinearOptions(factor=4, interpolation=interpolation))[::4].equal(rows)


def test_cubic_is_exact_for_parabolas_up_to_the_ends_and_linear_is_not() -> None:
    def parabola(at: torch.Tensor) -> torch.Tensor:
        return torch.stack((at**2 / 10 - at, 3 - at**2 / 5), dim=1).float()

    at = torch.arange(0, 9.01, 0.25, dtype=torch.float64)
    rows = parabola(torch.arange(10).double())
    torch.testing.assert_close(interpolated(rows, at, cubic=True), parabola(at), rtol=0, atol=2e-5)
    assert not torch.allclose(interpolated(rows, at), parabola(at), atol=2e-3)


def test_cubic_differs_from_linear_between_rows_and_both_end_with_the_last_row() -> None:
    rows = random_rows()
    at = torch.tensor([2.5, 11.0, 11.9])
    straight, cubic = interpolated(rows, at), interpolated(rows, at, cubic=True)
    assert not torch.allclose(straight[0], cubic[0])
    for found in (straight, cubic):
        assert found[1].equal(rows[-1]) and found[2].equal(rows[-1])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_tables(length: int) -> None:
    rows = random_rows(length)
    found = interpolated(rows, torch.arange(4 * length) / 4, cubic=True)
    assert bool(torch.isfinite(found).all()) and found[::4].equal(rows)


def test_a_grid_is_interpolated_along_each_axis_with_patch_centres_aligned() -> None:
    down, across = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    rows = torch.stack((down, across), dim=-1)
    new = resized(rows, (8, 18))
    for i in range(8):
        for j in range(18):
            centre = ((i + 0.5) / 2 - 0.5, (j + 0.5) / 3 - 0.5)
            wanted = [min(max(at, 0), most) for at, most in zip(centre, (3, 5), strict=True)]
            assert new[i, j].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("start", [0, 2])
def test_sines_are_read_by_their_law_from_the_first_row_on(start: int) -> None:
    law = Sinusoid(layout="halves", to_base=True)
    table = PositionTable(law.rows(torch.arange(10) + start, 8), law, start)
    new = stretched(table, 30, LinearOptions(factor=3))
    torch.testing.assert_close(new, law.rows(start + torch.arange(30) / 3, 8), rtol=0, atol=1e-6)
    # Position p is what position p / s was.
    assert new[::3].equal(table.rows)
    with pytest.raises(OptionError, match="not interpolated"):
        stretched(table, 30, LinearOptions(factor=3, interpolation="cubic"))


def test_nope_adds_nothing() -> None:
    assert zeros(PositionTable(random_rows()), 30, NopeOptions()).equal(torch.zeros(30, 6))
