"""Hierarchical decomposition against its definition, digit by digit."""

from __future__ import annotations

import pytest
import torch

import ropepatch
from ropepatch.errors import OptionError
from ropepatch.methods._tables import PositionTable
from ropepatch.methods.hierarchical import HierarchicalOptions, hierarchical
from ropepatch.testing import tiny_model


def rows_of(n: int = 7, dim: int = 5) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("alpha", [0.4, 0.1, 0.9])
def test_every_row_is_a_mixture_of_two_units(alpha: float) -> None:
    n = 7
    rows = rows_of(n)
    made = hierarchical(PositionTable(rows), n * n, HierarchicalOptions(factor=n, alpha=alpha))
    units = [[(float(x) - alpha * float(x0)) / (1 - alpha) for x, x0 in zip(row, rows[0], strict=True)] for row in rows]
    for p in range(n * n):
        i, j = divmod(p, n)
        wanted = [alpha * a + (1 - alpha) * b for a, b in zip(units[i], units[j], strict=True)]
        assert made[p].tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_first_rows_are_the_old_ones_and_all_rows_differ() -> None:
    rows = rows_of()
    made = hierarchical(PositionTable(rows), 49, HierarchicalOptions(factor=7))
    assert made[:7].equal(rows)
    distances = torch.cdist(made, made) + torch.eye(49)
    assert float(distances.min()) > 1e-3


def test_half_is_refused_for_two_positions_would_share_a_row() -> None:
    with pytest.raises(OptionError, match="share a row"):
        ropepatch.patch(tiny_model("bert", "encoder"), "hierarchical", factor=2, alpha=0.5)


def test_it_reaches_the_square_and_no_further() -> None:
    hierarchical(PositionTable(rows_of()), 49, HierarchicalOptions(factor=7))
    with pytest.raises(OptionError, match="count to 49"):
        hierarchical(PositionTable(rows_of()), 50, HierarchicalOptions(factor=8))
