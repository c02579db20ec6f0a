"""Where heads look: the share of attention by distance, a row for each layer or head."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ropepatch.errors import UsageError
from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._figures import figure_format, save_figure
from ropepatch.plotting._heatmap import COLOURS, run_titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Labels of rows closer than this many points would touch.
_LABEL = 9.0


def distance_heatmap(
    profiles: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    heads: bool = False,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw one panel for each profile, side by side on one scale: layers down, distances across.

    The first column is the share of attention on the first tokens of the text; it is left out of the others. A line
    stands at the trained length. The colours reach up to the largest share of all panels.

    Args:
        profiles: `DistanceProfile.to_dict()` of `ropepatch.evaluation.attention_distance`; one or several.
        heads: a row for each head, first layer first, instead of one for each layer with its heads averaged.
        titles: one for each panel; default the profiles' own.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: nothing to draw, as many titles as panels were not given, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    runs = [profiles] if isinstance(profiles, Mapping) else list(profiles)
    if path is not None:
        figure_format(path)
    if not runs:
        raise UsageError("a figure of distances needs at least one profile")
    titles = run_titles(runs, titles)
    grids = [_grid(run, heads) for run in runs]
    top = max(value for grid in grids for row in grid for value in row)
    rows, columns = max(len(grid) for grid in grids), max(len(grid[0]) for grid in grids)
    size = (1.4 + max(2.6, 0.3 * columns) * len(runs), 2.0 + min(12.0, max(1.2, (0.03 if heads else 0.16) * rows)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for panel, run, grid, title in zip(panels, runs, grids, titles, strict=True):
        panel.imshow(grid, cmap=COLOURS, vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
        _label(panel, run, title, heads, rows_per_point=len(grid) / (72 * (size[1] - 2.0)))
    figure.colorbar(panels[0].images[0], ax=list(panels), pad=0.02).set_label("share of attention")
    lines = {str(line.get_label()): line for panel in panels for line in panel.lines if line.get_linestyle() == "--"}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def _grid(profile: Mapping[str, Any], heads: bool) -> list[list[float]]:
    """The share on the first tokens and in each bucket, a row for each head or each layer."""
    grid: list[list[float]] = []
    for layer in profile["layers"]:
        rows = [[first, *shares] for first, shares in zip(layer["first_tokens"], layer["shares"], strict=True)]
        grid += rows if heads else [[sum(column) / len(rows) for column in zip(*rows, strict=True)]]
    return grid


def _label(panel: Axes, profile: Mapping[str, Any], title: str, heads: bool, *, rows_per_point: float) -> None:
    buckets: list[int] = profile["buckets"]
    names = [f"first {profile['first_tokens']}", *(_name(low, end) for low, end in _bounds(buckets, profile["length"]))]
    panel.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    panel.axvline(0.5, color="white", linewidth=2)
    panel.set_xlabel("distance in tokens")
    starts, row = [], 0
    for layer in profile["layers"]:
        starts.append(row)
        row += len(layer["first_tokens"]) if heads else 1
    every = max(1, math.ceil(_LABEL * rows_per_point * len(starts) / row))
    shown = range(0, len(starts), every)
    panel.set_yticks([starts[n] - 0.5 * heads for n in shown], [str(n) for n in shown], fontsize=8)
    panel.set_ylabel("layer, a row for each head" if heads else "layer, heads averaged")
    panel.set_title(textwrap.fill(title, width=max(26, 3 * len(names))), fontsize=9)
    trained = profile["trained_length"]
    if trained is not None and trained < profile["length"]:
        # A bucket of the distances 2^b to 2^(b+1) - 1 stands at b + 2, the first tokens being 0 and distance 0 being 1.
        at = math.log2(trained) + 1.5
        panel.axvline(at, color="white", linewidth=4)
        panel.axvline(at, color="black", linewidth=1.8, linestyle="--", label=f"trained length {trained:,}")


def _bounds(buckets: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The lowest distance of each bucket, and one past its highest."""
    return list(zip(buckets, [*buckets[1:], length], strict=True))


def _name(low: int, end: int) -> str:
    return f"{low:,}" if end - low == 1 else f"{low:,}–{end - 1:,}"
