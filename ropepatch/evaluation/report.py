"""The self-contained HTML page of one run, and the one of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.evaluation import _html as html
from ropepatch.evaluation.comparison import Comparison, ComparisonRow, perplexity
from ropepatch.evaluation.tables import AVERAGES, REACHES, difference, overview_name, overview_score, tokens
from ropepatch.files import write_atomic

if TYPE_CHECKING:
    from ropepatch.evaluation.overview import Overview

SAMPLE_FAILURES = 8
LONGEST_OUTPUT = 300


def report(run: Mapping[str, Any], summary: Mapping[str, Any], results: Sequence[str]) -> str:
    """The content of `report.html`: the results, and all that was asked.

    Args:
        run: the content of `run.json`.
        summary: the content of `summary.json`.
        results: the suite's own sections, ready HTML.
    """
    patch, served = run.get("patch"), run["configuration"].get("endpoint")
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
                html.definitions(patch_brief)
                if patch
                else html.note("Unknown: the model is served." if served else "None: the model as it was loaded."),
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
    where = "task" if all(cell["depth"] is None for cell in summary["cells"]) else "depth"
    caption = f"Accuracy by length and {where}"
    return [
        html.section("Accuracy by prompt length", _score_table(summary["by_length"]), html.note(_reach_note(summary))),
        html.section(caption, html.image(figures["heatmap.png"], caption.lower())),
        html.section("Cells", _score_table(summary["cells"])),
        html.section("Failures", *_failures(rows)),
    ]


def comparison_report(comparison: Comparison, figures: Mapping[str, bytes], *, title: str = "Comparison") -> str:
    """One page for several runs: their intervals side by side, differences on shared trials, figures on one scale.

    Args:
        comparison: what `compare` returned.
        figures: PNG files by caption.
        title: the page's heading.
    """
    lead = f"{comparison.suite}: {len(comparison.runs)} runs, differences to {comparison.base}"
    return html.page(title, lead, _comparison_sections(comparison, figures))


def overview_report(overview: Overview, figures: Sequence[Mapping[str, bytes]], *, title: str = "Comparison") -> str:
    """One page for several suites: one table of all, then what `comparison_report` shows of each.

    Args:
        overview: what `ropepatch.overview` returned.
        figures: of each comparison, PNG files by caption.
        title: the page's heading.
    """
    sections = [html.section("All suites", _overview_table(overview), html.note(overview.explanation()))]
    if overview.differing:
        sections.append(html.section(f"Differences to {overview.base}", _overview_differences(overview)))
    for comparison, own in zip(overview.comparisons, figures, strict=True):
        sections += _comparison_sections(comparison, own, prefix=f"{comparison.suite}: ")
    suites = ", ".join(dict.fromkeys(comparison.suite for comparison in overview.comparisons))
    return html.page(title, f"{suites}: {len(overview.settings)} settings, base {overview.base}", sections)


def write_comparison_report(comparison: Comparison, path: Path, *, title: str = "Comparison") -> None:
    """Draw the figures of all runs and write the page of `comparison_report` to `path`, atomically.

    Raises:
        OutputError: `path` cannot be written.
        DependencyError: matplotlib is missing.
    """
    write_atomic(path, comparison_report(comparison, _figures(comparison), title=title))


def write_overview_report(overview: Overview, path: Path, *, title: str = "Comparison") -> None:
    """The same with the page of `overview_report`."""
    figures = [_figures(comparison) for comparison in overview.comparisons]
    write_atomic(path, overview_report(overview, figures, title=title))


def _figures(comparison: Comparison) -> dict[str, bytes]:
    from ropepatch.plotting import accuracy_curve, figure_bytes, heatmap, loss_by_position

    summaries, titles = [run.summary for run in comparison.runs], [run.heading for run in comparison.runs]
    if comparison.measure == "loss":
        figures = {"Loss by position": loss_by_position(summaries, titles=titles)}
    else:
        depths = any(cell["depth"] is not None for summary in summaries for cell in summary["cells"])
        figures = {
            "Accuracy by prompt length": accuracy_curve(summaries, titles=titles),
            f"Accuracy by length and {'depth' if depths else 'task'}": heatmap(summaries, titles=titles),
        }
    return {caption: figure_bytes(figure) for caption, figure in figures.items()}


def _comparison_sections(comparison: Comparison, figures: Mapping[str, bytes], *, prefix: str = "") -> list[str]:
    loss = comparison.measure == "loss"
    rows = "Loss and perplexity" if loss else "Differences"
    sections = [
        html.section(
            f"{prefix}Runs",
            _runs_table(comparison),
            html.note(comparison.explanation()),
            *_differing(comparison.differing()),
        ),
        *(html.section(f"{prefix}{word}", html.image(png, f"{word}, every run")) for word, png in figures.items()),
        html.section(f"{prefix}{rows}", _rows_table(comparison, single=False)),
    ]
    if comparison.task_parts:
        sections.append(html.section(f"{prefix}Single tasks", _rows_table(comparison, single=True)))
    if not loss:
        failures = [html.fold(run.heading, *_failures(run.rows)) for run in comparison.runs]
        sections.append(html.section(f"{prefix}Failures", *failures))
    return sections


def _overview_table(overview: Overview) -> str:
    rows = []
    for setting in overview.settings:
        cells = []
        for column in overview.columns:
            row = overview.row(setting, column)
            cells.append("" if row is None else html.Number(overview_score(overview, column, row), row.score))
        rows.append([overview_name(overview, setting), *cells])
    return html.table(["setting", *(column.heading for column in overview.columns)], rows)


def _overview_differences(overview: Overview) -> str:
    rows = []
    for setting in overview.settings:
        found = [(overview.row(setting, column), column.comparison) for column in overview.differing]
        cells = [
            "" if row is None or row.difference is None else html.Number(difference(row, comparison), row.difference)
            for row, comparison in found
        ]
        if any(cells):
            rows.append([setting, *cells])
    return html.table(["setting", *(column.heading for column in overview.differing)], rows)


def _runs_table(comparison: Comparison) -> str:
    if comparison.measure == "loss":
        words = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    else:
        words = {name: word for name, word in AVERAGES.items() if any(name in run.summary for run in comparison.runs)}
    rows = [
        [
            run.name,
            run.title,
            str(run.model),
            *(_decimal(run.summary.get(name)) for name in words),
            *([] if comparison.measure == "loss" else [_reach(run.summary[name]) for name in REACHES]),
            _number(run.summary["trials"]),
            html.Code(str(run.path)),
        ]
        for run in comparison.runs
    ]
    reaches = ["documents"] if comparison.measure == "loss" else ["effective length", "self-relative", "trials"]
    return html.table(["run", "patch", "model", *words.values(), *reaches, "folder"], rows)


def _differing(settings: Mapping[str, Sequence[Any]]) -> list[str]:
    return [html.raw("Settings that differ, run by run", settings)] if settings else []


def _rows_table(comparison: Comparison, *, single: bool) -> str:
    """All rows: those of the single tasks, or those of all tasks together."""
    loss = comparison.measure == "loss"
    headings = [*(["task"] if single else []), "position" if loss else "length", "run", "documents" if loss else "n"]
    headings += ["loss" if loss else "accuracy", "95 % interval", *(["perplexity"] if loss else [])]
    headings += ["difference", "its interval", "shared", "better", "worse", "p", "p (Holm)"]
    body = []
    for row in comparison.rows:
        if (row.part.task is not None) != single:
            continue
        body.append(
            [
                *([str(row.part.task)] if single else []),
                html.Number(str(row.part), row.part.length or 0),
                row.run,
                _number(row.n),
                _decimal(row.score, 4 if loss else 3),
                _interval(row.ci_low, row.ci_high),
                *([_decimal(perplexity(row.score))] if loss else []),
                *_difference_cells(row),
            ]
        )
    return html.table(headings, body)


def _difference_cells(row: ComparisonRow) -> list[str]:
    if row.difference is None or row.p_value is None or row.p_adjusted is None:
        return [""] * 7
    return [
        html.Number(f"{row.difference:+z.3f}", row.difference),
        _interval(row.difference_low, row.difference_high, sign="+"),
        *(_number(count or 0) for count in (row.shared, row.gained, row.lost)),
        html.Number(f"{row.p_value:.3g}", row.p_value),
        html.Number(f"{row.p_adjusted:.3g}", row.p_adjusted),
    ]


def _score_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Cells or lengths with their scores; a column for whatever they have."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "task": lambda entry: str(entry["task"]),
        "length": lambda entry: _number(entry["length"]),
        "depth": lambda entry: html.Number(f"{entry['depth']:g}", entry["depth"]),
        "n": lambda entry: _number(entry["n"]),
        "accuracy": lambda entry: _decimal(entry["accuracy"]),
        "95 % interval": lambda entry: _interval(entry["ci_low"], entry["ci_high"]),
        "forced accuracy": lambda entry: _decimal(entry["forced_accuracy"]),
        "mean log-probability": lambda entry: _decimal(entry["mean_logprob"], 2),
    }
    fields = {"95 % interval": "ci_low", "forced accuracy": "forced_accuracy", "mean log-probability": "mean_logprob"}

    def has(entry: Mapping[str, Any], heading: str) -> bool:
        return entry.get(fields.get(heading, heading)) is not None

    shown = [heading for heading in columns if any(has(entry, heading) for entry in entries)]
    rows = [[columns[heading](entry) if has(entry, heading) else "" for heading in shown] for entry in entries]
    return html.table(shown, rows)


def _reach_note(summary: Mapping[str, Any]) -> str:
    return (
        f"Effective length (accuracy above {summary['effective_length_threshold']:.1%} at it and at every shorter "
        f"length): {tokens(summary['effective_length'])}. Against its own shortest length "
        f"({summary['effective_length_relative_share']:.0%} of it): {tokens(summary['effective_length_relative'])}. "
        f"Trained length: {_trained(summary['trained_length'])}."
    )


def _trained(length: int | None) -> str:
    return "unknown" if length is None else tokens(length)


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [row for row in rows if row["correct"] < 1]
    if not failed:
        return [html.note("None: every trial was right.")]
    # Spread over the grid rather than the first ones, which all share the shortest length.
    step = max(1, len(failed) // SAMPLE_FAILURES)
    sample = failed[::step][:SAMPLE_FAILURES]
    several = len({row["task"] for row in rows}) > 1
    depths = any(row["depth"] is not None for row in rows)
    parts = any(row["correct"] > 0 for row in failed)
    cells = [
        [
            *([str(row["task"])] if several else []),
            _number(row["length"]),
            *([_depth(row["depth"])] if depths else []),
            _number(row["trial"]),
            *([_decimal(row["correct"])] if parts else []),
            html.Code(_answer(row.get("answer", ""))[:LONGEST_OUTPUT]),
            html.Code(str(row.get("output", ""))[:LONGEST_OUTPUT]),
        ]
        for row in sample
    ]
    headings = [
        *(["task"] if several else []),
        "length",
        *(["depth"] if depths else []),
        "trial",
        *(["score"] if parts else []),
        "answer",
        "output",
    ]
    wrong = "trials that are not wholly right" if parts else "wrong trials"
    return [
        html.note(f"{len(sample)} of {len(failed)} {wrong} (of {len(rows)} in all)."),
        html.table(headings, cells),
    ]


def _answer(answer: Any) -> str:
    return ", ".join(map(str, answer)) if isinstance(answer, (list, tuple)) else str(answer)


def _depth(depth: float | None) -> str:
    return "" if depth is None else html.Number(f"{depth:g}", depth)


def _number(value: int) -> str:
    return html.Number(f"{value:,}", value)


def _decimal(value: float | None, places: int = 3) -> str:
    return "" if value is None else html.Number(f"{value:.{places}f}", value)


def _reach(length: int | None) -> str:
    # No reach sorts below every length.
    return html.Number("none", 0) if length is None else _number(length)


def _interval(low: float | None, high: float | None, *, sign: str = "") -> str:
    if low is None or high is None:
        return ""
    return html.Number(f"{low:{sign}z.3f} – {high:{sign}z.3f}", low)
