"""Loss against position, one line a run; and the loss of each document by position, as a map."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ropepatch.errors import UsageError
from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._figures import figure_format, save_figure
from ropepatch.plotting._heatmap import run_titles
from ropepatch.plotting.order._canvas import mark_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart without colour, by line style and marker; the colours are Okabe and Ito's, made for colour-vision
# deficiency.
_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "x"), ("-.", "P"), (":", "*"))
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_NAMED_DOCUMENTS = 40


def loss_by_position(
    summaries: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the loss of tokens against their position in the model's input, one line for each run.

    The band is the 95 % interval over documents, where there are several; a vertical line stands at each trained
    length that the positions reach beyond.

    Args:
        summaries: what a perplexity run's `summary.json` holds; one or several.
        titles: one for each run; default the summaries' own.
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
    if not any(run.get("by_position") for run in runs):
        raise UsageError("there is no loss by position to draw", given=f"{len(runs)} summaries")
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, (run, title) in enumerate(zip(runs, titles, strict=True)):
        _line(panel, run["by_position"], title, number)
    reach = max(entry["end"] for run in runs for entry in run["by_position"])
    for trained in sorted({run["trained_length"] for run in runs if run.get("trained_length")}):
        mark_length(panel, trained, "trained length", below=reach)
    panel.set_xlabel("position in the model's input (tokens)")
    panel.set_ylabel("loss (nats per token)")
    panel.set_xlim(0, reach)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.grid(axis="y", color="0.85", linewidth=0.6)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(2, len(runs)), fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def loss_heatmap(summary: Mapping[str, Any], *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the loss of every document (rows) by position (columns); what a document does not reach stays empty.

    Args:
        summary: what a perplexity run's `summary.json` holds.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: nothing to draw, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    positions = summary["by_position"]
    step = max(1, len(positions) // 8)
    columns = {i: f"{positions[i]['start']:,}" for i in range(0, len(positions), step)}
    rows = [(document["name"], document["loss_by_position"]) for document in summary["documents"]]
    label = "position in the model's input (tokens, first of each bucket)"
    return _map(rows, columns, str(summary["title"]), label, path)


def context_heatmap(summary: Mapping[str, Any], *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the loss of every document's end (rows) by what stands before it (columns).

    Args:
        summary: what a far_context run's `summary.json` holds.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError, DependencyError, OutputError: as `loss_heatmap`.
    """
    names = [entry["context"] for entry in summary["contexts"]]
    rows = [(document["name"], [document[name] for name in names]) for document in summary["documents"]]
    return _map(rows, dict(enumerate(names)), str(summary["title"]), "far text before the document's end", path)


def _map(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Mapping[int, str],
    title: str,
    label: str,
    path: str | os.PathLike[str] | None,
) -> Figure:
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if path is not None:
        figure_format(path)
    if not rows:
        raise UsageError("there is no document to draw", given=title)
    grid = [[float("nan") if loss is None else loss for loss in losses] for _, losses in rows]
    figure = Figure(figsize=(7.5, 1.6 + min(8.0, max(0.8, 0.3 * len(rows)))), layout="constrained")
    panel = figure.subplots()
    # Darker is worse, in black and white too; the ends of the scale are the data's own.
    image = panel.imshow(
        grid, cmap=colormaps["cividis_r"].with_extremes(bad="white"), aspect="auto", interpolation="nearest"
    )
    if len(rows) <= _NAMED_DOCUMENTS:
        names = [textwrap.shorten(str(name), 32, placeholder="...") for name, _ in rows]
        panel.set_yticks(range(len(rows)), names, fontsize=8)
    else:
        panel.set_yticks([])
        panel.set_ylabel(f"{len(rows)} documents")
    panel.set_xticks(list(columns), list(columns.values()), fontsize=8)
    panel.set_xlabel(label)
    panel.set_title(textwrap.fill(title, 90), fontsize=9)
    figure.colorbar(image, ax=panel, pad=0.02).set_label("loss (nats per token)")
    if path is not None:
        save_figure(figure, path)
    return figure


def _line(panel: Axes, entries: Sequence[Mapping[str, Any]], title: str, number: int) -> None:
    (style, marker), colour = _STYLES[number % len(_STYLES)], _COLOURS[number % len(_COLOURS)]
    middle = [(entry["start"] + entry["end"]) / 2 for entry in entries]
    panel.plot(
        middle,
        [entry["loss"] for entry in entries],
        color=colour,
        linestyle=style,
        marker=marker,
        markersize=4,
        markevery=max(1, len(entries) // 12),
        linewidth=1.4,
        label=textwrap.fill(title, 50),
    )
    known = [entry["ci_low"] is not None and entry["ci_high"] is not None for entry in entries]
    if any(known):
        low, high = (
            [math.log(entry[name]) if there else float("nan") for entry, there in zip(entries, known, strict=True)]
            for name in ("ci_low", "ci_high")
        )
        panel.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)
