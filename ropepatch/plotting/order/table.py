"""A position table as a picture, and the likeness of all its rows with one another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ropepatch.errors import UsageError
from ropepatch.plotting.order._canvas import MAP, canvas
from ropepatch.plotting.order.numbers import position_cosines, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

MOST_POSITIONS = 2048
"""Rows of a longer table are sampled evenly for the picture of all pairs."""


def position_table(rows_Pd: Tensor, *, title: str = "", path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw a table: positions down, dimensions across.

    Args:
        rows_Pd: the table, float, [P, d].
        title: of the figure.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: no rows, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    _check(rows_Pd)
    with canvas(path, size=(8.0, 5.0)) as (figure, (panel,)):
        top = float(rows_Pd.abs().max()) or 1.0
        image = panel.imshow(
            rows_Pd.float().numpy(), cmap=MAP, vmin=-top, vmax=top, aspect="auto", interpolation="nearest"
        )
        panel.set_xlabel("dimension")
        panel.set_ylabel("position")
        panel.set_title(title, fontsize=10)
        figure.colorbar(image, ax=panel, pad=0.02).set_label("value")
    return figure


def position_likeness(rows_Pd: Tensor, *, title: str = "", path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the cosine of the rows of all pairs of positions; at most 2,048 positions, taken evenly.

    Arguments and errors as in `position_table`.
    """
    _check(rows_Pd)
    taken = spread(len(rows_Pd), MOST_POSITIONS)
    with canvas(path, size=(6.4, 5.4)) as (figure, (panel,)):
        first, last = -0.5, len(rows_Pd) - 0.5
        image = panel.imshow(
            position_cosines(rows_Pd[taken]).numpy(),
            cmap=MAP,
            vmin=-1,
            vmax=1,
            extent=(first, last, last, first),
            interpolation="nearest",
        )
        panel.set_xlabel("position")
        panel.set_ylabel("position")
        panel.set_title(title, fontsize=10)
        figure.colorbar(image, ax=panel, pad=0.02).set_label("cosine of the two rows")
    return figure


def _check(rows_Pd: Tensor) -> None:
    if rows_Pd.dim() != 2 or not rows_Pd.numel():
        raise UsageError("a table has rows and columns", given=list(rows_Pd.shape), allowed="[positions, dimensions]")
