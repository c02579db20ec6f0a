"""One way to begin and end a figure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._figures import figure_format, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "cividis"
"""Lightness rises evenly: it reads in black and white, and with any colour vision."""


@contextmanager
def canvas(
    path: str | os.PathLike[str] | None,
    *,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    **options: Any,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure and its panels, row by row; saved to `path` when the block ends without an error.

    Args:
        path: where to save it, ending in .png or .svg; None saves nothing.
        size: inches, width and height.
        rows, columns: of panels.
        options: of `Figure.subplots`.

    Raises:
        UsageError: another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if path is not None:
        figure_format(path)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    yield figure, [panel for row in panels for panel in row]
    if path is not None:
        save_figure(figure, path)


def mark_length(panel: Axes, length: int | None, words: str, *, below: float) -> None:
    """A dotted line at a length in tokens, where there is one and the axis goes beyond it."""
    if length is None or length >= below:
        return
    panel.axvline(length, color="0.35", linewidth=1.2, linestyle=(0, (1, 1)))
    panel.annotate(
        f"{words} {length:,}",
        (length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -3),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )
