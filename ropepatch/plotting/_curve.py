"""Accuracy against prompt length, one line a run, with the interval of each."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ropepatch.errors import UsageError
from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._figures import figure_format, save_figure
from ropepatch.plotting._heatmap import run_titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# M. Okabe and K. Ito, Color Universal Design, 2008: told apart with any colour vision. Yellow is too pale for a line.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
"""Counts without a common divisor: the combinations repeat only after 385 lines, and differ in black and white."""

MOST_BANDS = 6
"""With more runs their intervals would hide each other: lines alone are drawn."""


def accuracy_curve(
    summaries: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw accuracy over length, one line for each summary, on a logarithmic axis of lengths.

    Up to six runs have their 95 % intervals as bands. The trained length is a grey line.

    Args:
        summaries: what `summarise` returns or `summary.json` holds; one or several.
        titles: one for each line; default the summaries' own.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: nothing to draw, as many titles as runs were not given, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    runs = [summaries] if isinstance(summaries, Mapping) else list(summaries)
    if path is not None:
        figure_format(path)
    titles = run_titles(runs, titles)
    lengths = sorted({row["length"] for run in runs for row in run["by_length"] if "accuracy" in row})
    if not lengths:
        raise UsageError("a curve needs at least one accuracy", given=f"{len(runs)} summaries")
    many = len(runs) > MOST_BANDS
    # The legend is below: its lines make the figure taller, not the plot smaller.
    figure = Figure(figsize=(9.0 if many else 7.5, 4.4 + 0.19 * math.ceil(len(runs) / 2)), layout="constrained")
    panel = figure.subplots()
    for number, (run, title) in enumerate(zip(runs, titles, strict=True)):
        _draw(panel, run["by_length"], title, number, band=not many)
    trained = sorted({run["trained_length"] for run in runs if run.get("trained_length") is not None})
    for length in trained:
        panel.axvline(length, color="0.45", linewidth=1.2, linestyle=(0, (1, 2)), label=f"trained length {length:,}")
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45, ha="right")
    panel.minorticks_off()
    panel.set_ylim(-0.03, 1.03)
    panel.set_xlabel("prompt length in tokens")
    panel.set_ylabel("accuracy" if many else "accuracy with 95 % interval")
    panel.grid(axis="y", color="0.9")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw(panel: Axes, by_length: Sequence[Mapping[str, Any]], title: str, number: int, *, band: bool) -> None:
    rows = sorted(by_length, key=lambda row: row["length"])
    lengths = [row["length"] for row in rows]
    colour = COLOURS[number % len(COLOURS)]
    panel.plot(
        lengths,
        [row["accuracy"] for row in rows],
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        linestyle=STYLES[number % len(STYLES)],
        markerfacecolor="none",
        # Lines that lie on each other: what is drawn first is larger, so that it shows around what is drawn last.
        markersize=max(4.0, 9.0 - 1.2 * (number % MOST_BANDS)),
        linewidth=1.6,
        label=title,
        clip_on=False,
        zorder=3,
    )
    if band:
        low, high = ([row[name] for row in rows] for name in ("ci_low", "ci_high"))
        panel.fill_between(lengths, low, high, color=colour, alpha=0.12, linewidth=0)
