"""What a RULER run shows: tasks by lengths with their averages, and the tasks that were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(summary: Mapping[str, Any]) -> Table:
    """The scores for a terminal: a row for each task, a column for each length, the averages below."""
    from rich.table import Table
    from rich.text import Text

    lengths = [entry["length"] for entry in summary["by_length"]]
    scores = {(entry["task"], entry["length"]): entry["accuracy"] for entry in summary["by_task"]}
    made = Table(title=Text(f"{summary['task']}: {summary['title']}"), caption=Text(_caption(summary)))
    made.add_column("task")
    for length in lengths:
        made.add_column(f"{length:,}", justify="right")
    for task in dict.fromkeys(entry["task"] for entry in summary["by_task"]):
        found = (scores.get((task, length)) for length in lengths)
        made.add_row(task, *("" if score is None else f"{score:.3f}" for score in found))
    made.add_section()
    made.add_row("mean", *(f"{entry['accuracy']:.3f}" for entry in summary["by_length"]))
    made.add_row(
        "95 % interval", *(f"{entry['ci_low']:.2f} - {entry['ci_high']:.2f}" for entry in summary["by_length"])
    )
    return made


def sections(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, bytes]) -> list[str]:
    """What `report.html` says of the results."""
    from ropepatch.evaluation import _html as html
    from ropepatch.evaluation.report import grid_sections

    averages = html.table(
        ["over the lengths", "score"],
        [
            [label, html.Number(f"{summary[name]:.3f}", summary[name])]
            for label, name in (
                ("mean", "average"),
                ("weights rising with the length (wAvg. inc)", "average_inc"),
                ("weights falling with the length (wAvg. dec)", "average_dec"),
            )
        ],
    )
    note = html.note(
        "A length's score is the mean of its tasks, each counting the same; its interval is Wilson's for that mean "
        "over all of its trials. " + _left_out(summary)
    )
    return [html.section("Averages", averages, note), *grid_sections(summary, rows, figures)]


def _caption(summary: Mapping[str, Any]) -> str:
    lines = [
        f"{label} {summary[name]:.3f}"
        for label, name in (("average", "average"), ("wAvg. (inc)", "average_inc"), ("wAvg. (dec)", "average_dec"))
    ]
    return "\n".join(filter(None, [*lines, _left_out(summary)]))


def _left_out(summary: Mapping[str, Any]) -> str:
    if not summary["skipped"]:
        return ""
    reasons = "; ".join(f"{task} ({reason})" for task, reason in summary["skipped"].items())
    return f"Left out: {reasons}."
