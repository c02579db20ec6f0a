"""Accuracy over prompt length and depth (or task), one panel a run, all on one fixed scale."""

from __future__ import annotations

import math
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

WIDEST = 16.0
"""Inches of a figure: more panels than fit in a row go below each other."""

CELL = 0.62, 0.42
"""Inches of a cell, width and height."""

Row = tuple[str | None, float | None]
"""What a row of cells shows: the task, where a run has several, and the depth, where the task has one."""


def heatmap(
    summaries: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw one panel for each summary on one scale from 0 to 1, as many side by side as are legible.

    Every panel shows the same lengths (columns) and depths (rows; the tasks, where they have no depth), those of all
    runs together; a cell that a run did not measure stays empty. The accuracy is written in each cell, and a line
    stands where prompts grow past the trained length.

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
    titles = run_titles(runs, titles)
    lengths = sorted({cell["length"] for run in runs for cell in run["cells"]})
    if not lengths:
        raise UsageError("a heatmap needs at least one measured cell", given=f"{len(runs)} summaries")
    several = len({cell.get("task") for run in runs for cell in run["cells"]}) > 1
    # Tasks stay in the order in which the suite has them.
    tasks = list(dict.fromkeys(cell.get("task") for run in runs for cell in run["cells"]))
    order = {str(task): number for number, task in enumerate(tasks)}
    rows = sorted(
        {_row(cell, several) for run in runs for cell in run["cells"]},
        key=lambda row: (order[row[0]] if row[0] else 0, -1.0 if row[1] is None else row[1]),
    )

    labels = [_label(row) for row in rows]
    margin = 0.6 + 0.075 * max(map(len, labels))
    width, height = max(2.4, CELL[0] * len(lengths)), max(1.2, CELL[1] * len(rows))
    across = max(1, min(len(runs), int((WIDEST - margin) / width)))
    down = math.ceil(len(runs) / across)
    across = math.ceil(len(runs) / down)
    figure = Figure(figsize=(margin + 0.5 + width * across, 1.2 + (height + 0.8) * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for panel in panels[len(runs) :]:
        panel.remove()
    panels = panels[: len(runs)]
    for number, (panel, run, title) in enumerate(zip(panels, runs, titles, strict=True)):
        values = {(cell["length"], _row(cell, several)): cell["accuracy"] for cell in run["cells"]}
        _draw(panel, values, title, lengths, rows)
        panel.set_yticks(range(len(rows)), labels, fontsize=8)
        if number % across == 0:
            panel.set_ylabel("task" if all(depth is None for _, depth in rows) else "depth")
        # Lengths stand below the last panel of each column only.
        lowest = number + across >= len(runs)
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths] if lowest else [], rotation=45, ha="right")
        panel.tick_params(axis="x", labelsize=8)
        if lowest:
            panel.set_xlabel("prompt length in tokens")
        if run.get("trained_length") is not None:
            _mark_trained(panel, run["trained_length"], lengths)
    # No longer than two rows of panels, at their top.
    bar = figure.colorbar(
        panels[0].images[0],
        ax=list(panels),
        ticks=[0, 0.25, 0.5, 0.75, 1],
        pad=0.02,
        shrink=min(1.0, 2 / down),
        anchor=(0.0, 1.0),
        aspect=20 * min(down, 2),
    )
    bar.set_label("accuracy")
    lines = {str(line.get_label()): line for panel in panels for line in panel.lines if line.get_linestyle() == "--"}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def run_titles(runs: Sequence[Mapping[str, Any]], titles: Sequence[str] | None) -> list[str]:
    """One title for each run: those given, else the summaries' own.

    Raises:
        UsageError: another number of titles than of runs.
    """
    if titles is None:
        return [str(run.get("title", f"run {number}")) for number, run in enumerate(runs, start=1)]
    if len(titles) != len(runs):
        raise UsageError("there must be one title for each run", given=list(titles), allowed=f"{len(runs)} titles")
    return list(titles)


def _row(cell: Mapping[str, Any], several: bool) -> Row:
    return (str(cell["task"]) if several and cell.get("task") is not None else None), cell["depth"]


def _label(row: Row) -> str:
    task, depth = row
    return " ".join([*([] if task is None else [task]), *([] if depth is None else [f"{depth:g}"])]) or "all"


def _draw(
    panel: Axes, values: Mapping[tuple[int, Row], float], title: str, lengths: list[int], rows: list[Row]
) -> None:
    from matplotlib import colormaps

    grid = [[values.get((length, row), float("nan")) for length in lengths] for row in rows]
    colours = colormaps[COLOURS].with_extremes(bad="white")
    panel.imshow(grid, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    for y, row in enumerate(rows):
        for x, length in enumerate(lengths):
            value = values.get((length, row))
            text = "–" if value is None else f"{value:.2f}"
            colour = "white" if value is not None and value < DARK_BELOW else "black"
            panel.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
    panel.set_title(textwrap.fill(title, width=max(26, 7 * len(lengths))), fontsize=9)


def _mark_trained(panel: Axes, trained: int, lengths: list[int]) -> None:
    """A line right of the last column that the model was trained for (at an edge when that is none or all)."""
    edge = sum(length <= trained for length in lengths) - 0.5
    # Black on white: visible on every colour of the map. Not clipped, so that it shows at an edge too.
    panel.axvline(edge, color="white", linewidth=4, clip_on=False)
    panel.axvline(
        edge, color="black", linewidth=1.8, linestyle="--", clip_on=False, label=f"trained length {trained:,}"
    )
