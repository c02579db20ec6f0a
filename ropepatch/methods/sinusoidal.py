"""The fixed table of sines and cosines: longer where the model has one, in the place of a learned table elsewhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from ropepatch.errors import OptionError
from ropepatch.methods._base import FactorOptions
from ropepatch.methods._sinusoid import Sinusoid, SinusoidLayout
from ropepatch.methods._tables import PositionTable, table_method


class SinusoidalOptions(FactorOptions):
    """Options of `sinusoidal`."""

    layout: SinusoidLayout | None = Field(
        default=None, description="where sines and cosines stand; by default the model's own, else 'interleaved'"
    )
    base: float | None = Field(
        default=None, gt=1, le=1e15, description="of the wavelengths 2 pi .. 2 pi x base; by default the model's own"
    )
    scale: float | None = Field(
        default=None, gt=0, le=1e6, description="of the rows; by default their mean norm stays what it was"
    )


@table_method(
    "sinusoidal",
    options=SinusoidalOptions,
    paper="arXiv 1706.03762",
    summary="a longer table of sines and cosines, or one in the place of a learned table",
    finetune="Puts sines and cosines in the place of the rows that the weights were trained with: useless untuned.",
    becomes="sinusoidal",
)
def sinusoidal(table: PositionTable, length: int, options: SinusoidalOptions) -> Tensor:
    """Rows sin(p w_i), cos(p w_i), w_i = base^(-2i/d), times one number; by the model's own law where it has one.

    Raises:
        OptionError: an odd width.
    """
    dim = table.rows.shape[-1]
    if dim % 2:
        raise OptionError("sines and cosines come in pairs", given=f"rows of {dim} numbers")
    own = table.law
    law = own or Sinusoid()
    changed = replace(law, layout=options.layout or law.layout, base=options.base or law.base)
    if options.scale is not None:
        # Of sines and cosines as they are, whatever the model's own are scaled by.
        changed = replace(changed, scale=1.0, shift=0.0)
    rows = changed.rows(torch.arange(length) + table.start, dim)
    if changed == own and options.scale is None:
        known = min(length, len(table.rows))
        rows[:known] = table.rows[:known]
        return rows
    scale = options.scale
    if scale is None:
        scale = float(table.rows.norm(dim=-1).mean() / rows.norm(dim=-1).mean())
    return rows * scale
