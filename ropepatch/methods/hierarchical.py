"""Hierarchical decomposition: one learned table of n rows makes n^2, by digits to the base n."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ropepatch.errors import OptionError
from ropepatch.methods._base import FactorOptions
from ropepatch.methods._tables import PositionTable, table_method


class HierarchicalOptions(FactorOptions):
    """Options of `hierarchical`."""

    alpha: float = Field(
        default=0.4, gt=0, lt=1, description="share of the higher digit in a row; not 0.5, where two digits could swap"
    )

    @model_validator(mode="after")
    def _digits_differ(self) -> HierarchicalOptions:
        if self.alpha == 0.5:
            raise ValueError("with alpha=0.5 the positions i n + j and j n + i would share a row")
        return self


@table_method(
    "hierarchical",
    options=HierarchicalOptions,
    paper="Su Jianlin, kexue.fm/archives/7947",
    summary="longer learned tables: two rows a position, one for each digit to the base of the trained length",
    mechanisms=("learned",),
)
def hierarchical(table: PositionTable, length: int, options: HierarchicalOptions) -> Tensor:
    """q_{i n + j} = alpha u_i + (1 - alpha) u_j with u_i = (p_i - alpha p_0) / (1 - alpha), i, j = 0 .. n - 1.

    The first n rows are the old ones.

    Raises:
        OptionError: more than n^2 rows.
    """
    n = len(table.rows)
    if length > n * n:
        raise OptionError(
            f"two digits to the base {n} count to {n * n}", given=f"{length} positions", hint=f"factor is at most {n}"
        )
    rows, alpha = table.rows.double(), options.alpha
    units = (rows - alpha * rows[0]) / (1 - alpha)
    at = torch.arange(length)
    made = (alpha * units[at // n] + (1 - alpha) * units[at % n]).float()
    made[:n] = table.rows[:length]
    return made
