"""The self-contained HTML page of one run, and the one of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.evaluation import _html as html
from ropepatch.files import write_atomic

if TYPE_CHECKING:
    from ropepatch.evaluation.compare import Comparison

SAMPLE_FAILURES = 8
LONGEST_OUTPUT = 300


def report(run: Mapping[str, Any], summary: Mapping[str, Any], results: Sequence[str]) -> str:
    """The content of `report.html`: the results, and all that was asked.

    Args:
        run: the content of `run.json`.
        summary: the content of `summary.json`.
        results: the suite's own sections, ready HTML.
    """
    patch = run.get("patch")
    lead = f"{run.get('model')}, {summary['title']}: {summary['trials']} trials, {run.get('created')}"
    configuration = {name: value for name, value in run["configuration"].items() if name != "patch"}
    patch_brief = {name: value for name, value in (patch or {}).items() if name not in ("sites", "versions")}
    return html.page(
        f"{summary['task']}: {summary['title']}",
        lead,
        [
            *results,
            html.section(
                "Patch",
                html.definitions(patch_brief) if patch else html.note("None: the model as it was loaded."),
                *([html.raw("The whole patch record", patch)] if patch else []),
            ),
            html.section("Configuration", html.definitions(configuration)),
            html.section("Versions", html.definitions(run.get("versions", {}))),
        ],
    )


def grid_sections(
    summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, bytes]
) -> list[str]:
    """What a grid of trials says: accuracy with intervals, the heatmap, every cell, some failures."""
    return [
        html.section("Accuracy by prompt length", _length_table(summary), html.note(_reach_note(summary))),
        html.section(
            "Accuracy by length and depth", html.image(figures["heatmap.png"], "accuracy by length and depth")
        ),
        html.section("Cells", _cell_table(summary)),
        html.section("Failures", *_failures(rows)),
    ]


def comparison_report(comparison: Comparison, heatmap_png: bytes, *, title: str = "Comparison") -> str:
    """One page for several runs: their intervals side by side, differences on shared trials, one heatmap each.

    Args:
        comparison: what `compare` returned.
        heatmap_png: all runs' heatmaps on one scale.
        title: the page's heading.
    """
    first = comparison.runs[0].name
    headings = ["length", "run", "n", "accuracy", "95 % interval", f"difference to {first}", "gained", "lost", "p"]
    rows = [
        [
            html.Number(f"{row.length:,}", row.length),
            row.run,
            html.Number(str(row.n), row.n),
            html.Number(f"{row.accuracy:.3f}", row.accuracy),
            _interval(row.ci_low, row.ci_high),
            *_difference_cells(row),
        ]
        for row in comparison.rows
    ]
    runs = [
        [run.name, run.title, str(run.model), _tokens(run.summary["effective_length"]), html.Code(str(run.path))]
        for run in comparison.runs
    ]
    sections = [
        html.section(
            "Runs",
            html.table(["run", "patch", "model", "effective length", "folder"], runs),
            html.note(comparison.explanation()),
        ),
        html.section("Accuracy by length and depth", html.image(heatmap_png, "accuracy of every run")),
        html.section("Accuracy by prompt length", html.table(headings, rows)),
    ]
    failures = [_failures_of(run.name, run.rows) for run in comparison.runs]
    sections.append(html.section("Failures", *failures))
    return html.page(title, ", ".join(f"{run.name}: {run.title}" for run in comparison.runs), sections)


def write_comparison_report(comparison: Comparison, path: Path, *, title: str = "Comparison") -> None:
    """Draw every run's heatmap and write the page of `comparison_report` to `path`, atomically.

    Raises:
        OutputError: `path` cannot be written.
        DependencyError: matplotlib is missing.
    """
    from ropepatch.plotting import figure_bytes, heatmap

    image = figure_bytes(
        heatmap([run.summary for run in comparison.runs], titles=[run.heading for run in comparison.runs])
    )
    write_atomic(path, comparison_report(comparison, image, title=title))


def _difference_cells(row: Any) -> list[str]:
    if row.difference is None:
        return ["", "", "", ""]
    return [
        html.Number(f"{row.difference:+.3f}", row.difference),
        html.Number(str(row.gained), row.gained),
        html.Number(str(row.lost), row.lost),
        html.Number(f"{row.p_value:.3g}", row.p_value),
    ]


def _failures_of(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return html.subheading(name) + "\n" + "\n".join(_failures(rows))


def _length_table(summary: Mapping[str, Any]) -> str:
    headings = ["length", "n", "accuracy", "95 % interval", "forced accuracy", "mean log-probability"]
    return html.table(headings, [[_number(row["length"]), *_score_cells(row)] for row in summary["by_length"]])


def _cell_table(summary: Mapping[str, Any]) -> str:
    headings = ["length", "depth", "n", "accuracy", "95 % interval", "forced accuracy", "mean log-probability"]
    rows = [
        [_number(cell["length"]), html.Number(f"{cell['depth']:g}", cell["depth"]), *_score_cells(cell)]
        for cell in summary["cells"]
    ]
    return html.table(headings, rows)


def _score_cells(row: Mapping[str, Any]) -> list[str]:
    forced, logprob = row.get("forced_accuracy"), row.get("mean_logprob")
    return [
        _number(row["n"]),
        html.Number(f"{row['accuracy']:.3f}", row["accuracy"]),
        _interval(row["ci_low"], row["ci_high"]),
        "" if forced is None else html.Number(f"{forced:.3f}", forced),
        "" if logprob is None else html.Number(f"{logprob:.2f}", logprob),
    ]


def _reach_note(summary: Mapping[str, Any]) -> str:
    return (
        f"Effective length (accuracy above {summary['effective_length_threshold']:.1%} at it and at every shorter "
        f"length): {_tokens(summary['effective_length'])}. Against its own shortest length "
        f"({summary['effective_length_relative_share']:.0%} of it): {_tokens(summary['effective_length_relative'])}. "
        f"Trained length: {_tokens(summary['trained_length'])}."
    )


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [row for row in rows if row["correct"] < 1]
    if not failed:
        return [html.note("None: every trial was right.")]
    # Spread over the grid rather than the first ones, which all share the shortest length.
    step = max(1, len(failed) // SAMPLE_FAILURES)
    sample = failed[::step][:SAMPLE_FAILURES]
    cells = [
        [
            _number(row["length"]),
            html.Number(f"{row['depth']:g}", row["depth"]),
            _number(row["trial"]),
            html.Code(str(row.get("answer", ""))),
            html.Code(str(row.get("output", ""))[:LONGEST_OUTPUT]),
        ]
        for row in sample
    ]
    return [
        html.note(f"{len(sample)} of {len(failed)} wrong trials (of {len(rows)} in all)."),
        html.table(["length", "depth", "trial", "answer", "output"], cells),
    ]


def _number(value: int) -> str:
    return html.Number(f"{value:,}", value)


def _interval(low: float, high: float) -> str:
    return html.Number(f"{low:.3f} – {high:.3f}", low)


def _tokens(length: int | None) -> str:
    return "none" if length is None else f"{length:,} tokens"
