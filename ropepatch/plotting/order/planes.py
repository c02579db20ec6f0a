"""The planes of a rotary head: where positions point."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ropepatch.errors import UsageError
from ropepatch.plotting.order._canvas import canvas
from ropepatch.plotting.order.numbers import circles, spread, wavelengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

MOST_POINTS = 200
"""Positions drawn in a plane."""


def rotation_planes(
    inv_freq: Tensor,
    length: int,
    *,
    trained_length: int | None = None,
    planes: Sequence[int] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw where positions 0 .. length - 1 point in some planes: trained ones filled, later ones as crosses.

    A cross where no dot is near stands for an angle that training never showed.

    Args:
        inv_freq: radians per token, [F].
        length: positions to draw.
        trained_length: in tokens; by default all are trained.
        planes: numbers of the planes; by default eight, evenly from the fastest to the slowest.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: no such plane, a length below 1, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    if length < 1:
        raise UsageError("the input has no token", given=length, allowed=">= 1")
    chosen = list(spread(len(inv_freq), 8).tolist() if planes is None else planes)
    wrong = [plane for plane in chosen if not 0 <= plane < len(inv_freq)]
    if wrong or not chosen:
        raise UsageError("no such plane", given=wrong or "none", allowed=f"0..{len(inv_freq) - 1}")
    positions = spread(length, MOST_POINTS)
    trained = positions < (length if trained_length is None else trained_length)
    points = circles(inv_freq[torch.tensor(chosen)], positions)
    turns = wavelengths(inv_freq)
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    with canvas(path, size=(2.1 * columns, 2.3 * rows), rows=rows, columns=columns) as (figure, panels):
        for panel in panels:
            panel.set_axis_off()
            panel.set_aspect("equal")
            panel.set_xlim(-1.15, 1.15)
            panel.set_ylim(-1.15, 1.15)
        for panel, plane, dots in zip(panels, chosen, points, strict=False):
            x, y = dots[trained].T.numpy()
            panel.scatter(x, y, s=9, color="black", linewidths=0)
            x, y = dots[~trained].T.numpy()
            panel.scatter(x, y, s=16, color="#D55E00", marker="x", linewidths=0.8)
            panel.set_title(f"plane {plane}: " + _words(float(turns[plane])), fontsize=8)
    return figure


def _words(wavelength: float) -> str:
    if math.isinf(wavelength):
        return "does not turn"
    return f"{wavelength:,.0f} tokens a turn" if wavelength >= 100 else f"{wavelength:.3g} tokens a turn"
