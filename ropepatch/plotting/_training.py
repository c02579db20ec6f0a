"""The loss of training runs against their steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ropepatch.errors import UsageError
from ropepatch.plotting._dependency import require_matplotlib
from ropepatch.plotting._figures import figure_format, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", "-.", ":")
# With more steps than this, a running mean over a fiftieth of them is drawn over the single steps.
_MANY = 100


def training_curve(
    logs: Sequence[Sequence[Mapping[str, Any]]],
    *,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the loss of one or several training runs, one line a run, and the learning rate where there is one run.

    Args:
        logs: the lines of `log.jsonl` of each run: `step`, `loss` (nats per token) and `learning_rate`.
        titles: one for each run.
        path: where to save the figure too, ending in .png or .svg.

    Raises:
        UsageError: nothing to draw, as many titles as runs were not given, or another ending of `path`.
        DependencyError: matplotlib is missing.
        OutputError: `path` cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if path is not None:
        figure_format(path)
    if titles is None:
        titles = [""] if len(logs) == 1 else [f"run {number}" for number in range(1, len(logs) + 1)]
    if len(titles) != len(logs):
        raise UsageError("there must be a title for each run", given=len(titles), allowed=str(len(logs)))
    if not any(logs):
        raise UsageError("there is no training step to draw", given=f"{len(logs)} logs")
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, (log, title) in enumerate(zip(logs, titles, strict=True)):
        steps, losses = [line["step"] for line in log], [line["loss"] for line in log]
        colour = _COLOURS[number % len(_COLOURS)]
        style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
        if len(steps) > _MANY:
            panel.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            losses = _running_mean(losses, len(losses) // 50)
        panel.plot(
            steps, losses, style, color=colour, linewidth=1.4, marker="o" if len(steps) == 1 else None, label=title
        )
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("training loss (nats per token)")
    panel.grid(axis="y", color="0.85", linewidth=0.6)
    panel.set_axisbelow(True)
    rates = [(line["step"], line["learning_rate"]) for line in logs[0] if "learning_rate" in line]
    if len(logs) == 1 and rates:
        other = panel.twinx()
        other.plot(*zip(*rates, strict=True), ":", color="0.45", linewidth=1.0)
        other.set_ylabel("learning rate (dotted)")
        other.set_ylim(bottom=0)
        other.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if any(titles):
        figure.legend(loc="outside lower center", ncols=min(2, len(logs)), fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of each value and the `width` - 1 before it; of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
