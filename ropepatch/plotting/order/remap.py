"""The distances that a model's attention expresses, as a matrix of queries and keys."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ropepatch.attention.scheme import Scheme
from ropepatch.errors import UsageError
from ropepatch.plotting.order._canvas import MAP, canvas
from ropepatch.plotting.order.numbers import scaled_distances, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POSITIONS = 512
"""Of a longer input as many queries and keys are taken, evenly."""


def distance_matrix(
    scheme: Scheme,
    length: int,
    *,
    trained_length: int | None = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the distance between every query (down) and key (across) as their rotations express it.

    Invisible pairs stay white. A line on the scale stands at the trained length: what lies beyond was never trained.

    Args:
        scheme: of the attention.
        length: tokens of the input.
        trained_length: in tokens.
        title: of the figure.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: a length below 1, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    if length < 1:
        raise UsageError("the input has no token", given=length, allowed=">= 1")
    taken = spread(length, MOST_POSITIONS)
    with canvas(path, size=(6.8, 5.6)) as (figure, (panel,)):
        from matplotlib import colormaps

        first, last = -0.5, length - 0.5
        image = panel.imshow(
            scaled_distances(scheme, taken, taken).relative.numpy(),
            cmap=colormaps[MAP].with_extremes(bad="white"),
            extent=(first, last, last, first),
            interpolation="nearest",
        )
        panel.set_xlabel("key")
        panel.set_ylabel("query")
        panel.set_title(title, fontsize=10)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        bar = figure.colorbar(image, ax=panel, pad=0.02)
        bar.set_label("distance as rotated (tokens)")
        low, high = image.get_clim()
        if trained_length is not None and low < trained_length < high:
            bar.ax.axhline(trained_length, color="white", linewidth=2)
            bar.ax.axhline(trained_length, color="black", linewidth=1, linestyle="--")
    return figure
