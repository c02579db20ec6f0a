"""Accuracy over prompt length and depth, one panel a run, all on one fixed scale."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ropepatch.errors import UsageError
from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._figures import figure_format, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "cividis"
"""Made for colour-vision deficiency, and its lightness rises evenly: it reads in black and white too."""

DARK_BELOW = 0.55
"""Cells below this accuracy are dark: their number is white."""


def heatmap(
    summaries: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw one panel for each summary, side by side on one scale from 0 to 1.

    Every panel shows the same lengths (columns) and depths (rows), those of all runs together; a cell that a run did
    not measure stays empty. The accuracy is written in each cell, and a line stands where prompts grow past the
    trained length.

    Args:
        summaries: what `summarise` returns or `summary.json` holds; one or several.
        titles: one for each panel; default the summaries' own.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: nothing to draw, as many titles as panels were not given, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    runs = [summaries] if isinstance(summaries, Mapping) else list(summaries)
    if path is not None:
        figure_format(path)
    if titles is None:
        titles = [str(run.get("title", f"run {number}")) for number, run in enumerate(runs, start=1)]
    if len(titles) != len(runs):
        raise UsageError("there must be one title for each run", given=list(titles), allowed=f"{len(runs)} titles")
    lengths = sorted({cell["length"] for run in runs for cell in run["cells"]})
    depths = sorted({cell["depth"] for run in runs for cell in run["cells"]})
    if not lengths:
        raise UsageError("a heatmap needs at least one measured cell", given=f"{len(runs)} summaries")

    width = 1.1 + max(2.4, 0.62 * len(lengths)) * len(runs)
    figure = Figure(figsize=(width, 2.0 + max(1.2, 0.42 * len(depths))), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for panel, run, title in zip(panels, runs, titles, strict=True):
        _draw(panel, run, title, lengths, depths)
    panels[0].set_ylabel("depth of the key")
    bar = figure.colorbar(panels[0].images[0], ax=list(panels), ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.02)
    bar.set_label("accuracy")
    lines = {str(line.get_label()): line for panel in panels for line in panel.lines if line.get_linestyle() == "--"}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw(panel: Axes, run: Mapping[str, Any], title: str, lengths: list[int], depths: list[float]) -> None:
    from matplotlib import colormaps

    values = {(cell["length"], cell["depth"]): cell["accuracy"] for cell in run["cells"]}
    grid = [[values.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    colours = colormaps[COLOURS].with_extremes(bad="white")
    panel.imshow(grid, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            value = values.get((length, depth))
            text = "–" if value is None else f"{value:.2f}"
            colour = "white" if value is not None and value < DARK_BELOW else "black"
            panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    panel.set_title(textwrap.fill(title, width=max(26, 7 * len(lengths))), fontsize=9)
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=8)
    panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    panel.set_xlabel("prompt length in tokens")
    trained = run.get("trained_length")
    if trained is not None:
        _mark_trained(panel, trained, lengths)


def _mark_trained(panel: Axes, trained: int, lengths: list[int]) -> None:
    """A line right of the last column that the model was trained for (at an edge when that is none or all)."""
    edge = sum(length <= trained for length in lengths) - 0.5
    # Black on white: visible on every colour of the map. Not clipped, so that it shows at an edge too.
    panel.axvline(edge, color="white", linewidth=4, clip_on=False)
    panel.axvline(
        edge, color="black", linewidth=1.8, linestyle="--", clip_on=False, label=f"trained length {trained:,}"
    )
