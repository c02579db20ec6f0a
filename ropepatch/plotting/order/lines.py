"""Curves of order: long-range decay, wavelengths of the planes, bias by distance."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ropepatch.errors import UsageError
from ropepatch.plotting._curve import COLOURS, MARKERS, STYLES
from ropepatch.plotting.order._canvas import canvas, mark_length
from ropepatch.plotting.order.numbers import averaged, wavelengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


def decay(
    distances: Tensor,
    curves: Mapping[str, tuple[Tensor, Tensor]],
    *,
    trained_length: int | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw what is left of a match (above) and the bound of any product (below) over the distance, each the mean over
    up to 256 groups of neighbouring distances.

    Args:
        distances: int64 [N], in tokens.
        curves: label to the values of `numbers.match` and of `numbers.bound` at these distances, [N] each.
        trained_length: in tokens, for a mark.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: nothing to draw, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    _some(curves)
    reach = float(distances.max())
    with canvas(path, size=(8.0, 6.4), rows=2, sharex=True) as (figure, panels):
        for panel, which, label in zip(panels, (0, 1), ("match left", "bound of any product"), strict=True):
            for number, (name, values) in enumerate(curves.items()):
                _line(panel, *averaged(distances, values[which]), name, number)
            mark_length(panel, trained_length, "trained length", below=reach)
            panel.set_ylabel(label)
            panel.grid(color="0.9")
        panels[0].axhline(0, color="0.6", linewidth=0.8)
        panels[1].set_xlabel("distance (tokens)")
        panels[1].set_xlim(0, reach)
        panels[1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _legend(figure, panels[0])
    return figure


def plane_wavelengths(
    frequencies: Mapping[str, Tensor],
    *,
    trained_length: int | None = None,
    target_length: int | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the wavelength of every plane, one line for each label, against the trained and the target length.

    With several labels the lower panel holds the ratio of each to the first: the ramp of a patch. Planes that do not
    turn have no wavelength and are left open.

    Args:
        frequencies: label to inv_freq, float32 [F], radians per token; the first is what the others are held against.
        trained_length, target_length: in tokens, for marks.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: nothing to draw, scales of another number of planes, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    _some(frequencies)
    sizes = {len(inv_freq) for inv_freq in frequencies.values()}
    if len(sizes) > 1:
        raise UsageError("the scales to compare have different numbers of planes", given=sorted(sizes))
    found = {name: wavelengths(inv_freq) for name, inv_freq in frequencies.items()}
    found = {name: values.masked_fill(values.isinf(), float("nan")) for name, values in found.items()}
    first = next(iter(found.values()))
    rows = 1 if len(found) == 1 else 2
    with canvas(path, size=(8.0, 2.2 + 2.1 * rows), rows=rows, sharex=True) as (figure, panels):
        planes = range(len(first))
        for number, (name, values) in enumerate(found.items()):
            _line(panels[0], planes, values, name, number)
            if number:
                _line(panels[1], planes, values / first, name, number)
        panels[0].set_yscale("log", base=2)
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        panels[0].set_ylabel("wavelength (tokens)")
        for length, words in ((trained_length, "trained length"), (target_length, "target length")):
            if length is not None and (words == "trained length" or length != trained_length):
                panels[0].axhline(length, color="0.35", linewidth=1.2, linestyle=(0, (1, 1)))
                panels[0].annotate(f"{words} {length:,}", (0, length), va="bottom", fontsize=8)
        if rows == 2:
            panels[1].set_ylabel(f"ratio to {next(iter(found))}")
        panels[-1].set_xlabel("plane")
        for panel in panels:
            panel.grid(color="0.9")
        _legend(figure, panels[0])
    return figure


def bias_curves(
    distances: Tensor, bias_HN: Tensor, *, title: str = "", path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw the bias by distance, one line a head; beyond eight heads, eight of them taken evenly are named.

    Args:
        distances: int64 [N], in tokens, rising; below 0 for keys ahead.
        bias_HN: float [H, N], added to the scores.
        title: of the figure.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: no heads, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    heads = len(bias_HN)
    if not heads:
        raise UsageError("a bias needs heads")
    named = set(range(heads)) if heads <= 8 else {round(i * (heads - 1) / 7) for i in range(8)}
    with canvas(path, size=(8.0, 4.6)) as (figure, (panel,)):
        for head in range(heads):
            if head in named:
                _line(panel, distances, bias_HN[head], f"head {head}", sorted(named).index(head))
            else:
                panel.plot(distances.numpy(), bias_HN[head].numpy(), color="0.8", linewidth=0.7, zorder=1)
        panel.set_xlabel("distance (tokens)")
        panel.set_ylabel("added to the score")
        panel.set_xlim(float(distances.min()), float(distances.max()))
        panel.set_title(title, fontsize=10)
        panel.grid(color="0.9")
        _legend(figure, panel)
    return figure


def _some(curves: Mapping[str, object]) -> None:
    if not curves:
        raise UsageError("there is nothing to draw")


def _line(panel: Axes, x: Iterable[float] | Tensor, values: Tensor, label: str, number: int) -> None:
    panel.plot(
        [float(value) for value in x],
        values.numpy(),
        label=label,
        color=COLOURS[number % len(COLOURS)],
        linestyle=STYLES[number % len(STYLES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        markevery=max(1, len(values) // 8),
        linewidth=1.3,
    )


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
