"""Laws of tables of sines: found from the table, extended exactly, swapped in at the size of the old rows."""

from __future__ import annotations

import math

import pytest
import torch

from ropepatch.errors import OptionError
from ropepatch.methods._sinusoid import Sinusoid, law_of, sinusoid_table
from ropepatch.methods._tables import PositionTable
from ropepatch.methods.sinusoidal import SinusoidalOptions, sinusoidal

LAWS = [
    Sinusoid(way, first, to) for way in ("interleaved", "halves") for first in (False, True) for to in (False, True)
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_law_is_found_from_its_table_with_a_row_for_padding(law: Sinusoid, dtype: torch.dtype) -> None:
    table = law.rows(torch.arange(40), 16)
    table[1] = 0
    assert law_of(table.to(dtype)) == law
    table[5] += 0.1
    assert law_of(table.to(dtype)) is None


def test_laws_are_the_papers_and_tensor2tensors() -> None:
    assert Sinusoid().rows(torch.arange(9), 8).equal(sinusoid_table(torch.arange(9), 8))
    rows = Sinusoid("halves", to_base=True).rows(torch.arange(30), 8)
    for p in (0, 3, 29):
        for i in range(4):
            angle = p * math.exp(-i * math.log(10000) / 3)
            assert float(rows[p, i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(rows[p, i + 4]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_learned_rows_have_no_law() -> None:
    assert law_of(torch.randn(20, 8, generator=torch.Generator().manual_seed(0))) is None


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("start", [0, 2])
def test_a_longer_table_is_the_same_law_and_keeps_the_models_rows(law: Sinusoid, start: int) -> None:
    own = law.rows(start + torch.arange(10), 8) + 1e-5  # as a model's float32 may have it
    made = sinusoidal(PositionTable(own, law, start), 40, SinusoidalOptions(factor=4))
    assert made[:10].equal(own)
    assert made[10:].equal(law.rows(start + torch.arange(10, 40), 8))


def test_a_swap_has_the_size_of_the_rows_before() -> None:
    rows = 0.02 * torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    made = sinusoidal(PositionTable(rows), 60, SinusoidalOptions(factor=2))
    assert float(made.norm(dim=-1).mean()) == pytest.approx(float(rows.norm(dim=-1).mean()), rel=1e-5)
    unit = sinusoidal(PositionTable(rows), 60, SinusoidalOptions(factor=2, scale=1.0, layout="halves", base=500))
    assert unit.equal(sinusoid_table(torch.arange(60), 16, base=500, layout="halves"))


def test_an_odd_width_has_no_pairs() -> None:
    with pytest.raises(OptionError, match="pairs"):
        sinusoidal(PositionTable(torch.randn(4, 7)), 8, SinusoidalOptions(factor=2))
