"""Position interpolation: positions divided by the factor, wherever they enter."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ropepatch.errors import OptionError
from ropepatch.methods._base import FactorOptions, Frequencies, RotaryGeometry, frequency_method, scaled_length
from ropepatch.methods._interpolation import interpolated, resized
from ropepatch.methods._tables import PositionTable, TableRule


class LinearOptions(FactorOptions):
    """Options of `linear`."""

    interpolation: Literal["linear", "cubic"] = Field(
        default="linear", description="between the rows of a learned position table; other models have no use for it"
    )


def stretched(table: PositionTable, length: int, options: LinearOptions) -> Tensor:
    """Row p is the old table's at p / s: by its law where it has one, else between two rows.

    Raises:
        OptionError: `interpolation="cubic"` for a table of sines and cosines, which are computed exactly.
    """
    at = torch.arange(length, dtype=torch.float64) / options.factor
    if table.law is None:
        return interpolated(table.rows, at, cubic=options.interpolation == "cubic")
    if options.interpolation != "linear":
        raise OptionError(
            "the table holds sines and cosines, which are computed between rows and not interpolated",
            given=f"interpolation={options.interpolation!r}",
        )
    # The model's own rows where nothing is between them: its float32 angles are a little off.
    inside = (at == at.floor()) & (at < len(table.rows))
    rows = table.law.rows(at + table.start, table.rows.shape[-1])
    rows[inside] = table.rows[at[inside].long()]
    return rows


def _grid(rows: Tensor, size: tuple[int, int], options: Any) -> Tensor:
    return resized(rows, size, cubic=options.interpolation == "cubic")


@frequency_method(
    "linear",
    aliases=("pi",),
    options=LinearOptions,
    paper="arXiv 2306.15595",
    summary="divide every frequency, slope or bucketed distance by the factor; interpolate position tables",
    rope_type="linear",
    mechanisms=("rotary", "alibi", "relative_bias", "learned", "sinusoidal"),
    table=TableRule(stretched, grid=_grid, only=("interpolation",)),
)
def linear(geometry: RotaryGeometry, options: FactorOptions) -> Frequencies:
    """f_i / s. Crowds the high frequencies: weak without finetuning."""
    return Frequencies(
        inv_freq=geometry.inv_freq / options.factor,
        target_length=scaled_length(geometry, options.factor),
        rope_parameters={"rope_type": "linear", "factor": options.factor},
    )
