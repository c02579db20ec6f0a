"""A comparison as text: for the terminal and as Markdown.

Up to four runs stand side by side, a line for each length. More stand one below the other, a column for each length,
and their differences to the base in a table of their own. Of several suites, a row is a setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ropepatch.evaluation.comparison import Comparison, ComparisonRow, Measure, Run, perplexity

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ropepatch.evaluation.overview import Column, Overview

MOST_COLUMNS = 4
"""So many runs fit side by side."""

WIDE = 7
"""With more columns, intervals go below their scores in the terminal."""

NOTHING = "–"

REACHES = {"effective_length": "effective", "effective_length_relative": "self-relative"}
"""How far a run reaches, by the names in its summary."""

AVERAGES = {"average": "average", "average_inc": "wAvg (inc)", "average_dec": "wAvg (dec)"}
"""RULER's averages over lengths, where a suite has them."""


class Lines(NamedTuple):
    """A table of plain text; a cell may have several lines. The first column is on the left, or on the right."""

    title: str
    headings: list[str]
    body: list[list[str]]
    numbers_first: bool


def lines(comparison: Comparison) -> list[Lines]:
    """The tables of a comparison: all tasks together; then the single tasks where they fit, else the differences."""
    if len(comparison.runs) > MOST_COLUMNS:
        return [_runs_below_each_other(comparison), _differences(comparison)]
    tables = [_runs_side_by_side(comparison)]
    if comparison.task_parts:
        tables.append(_single_tasks(comparison))
    return tables


def overview_lines(overview: Overview) -> list[Lines]:
    """The tables of several suites: scores, and differences to the base where there are some."""
    scores = [
        [
            overview_name(overview, setting),
            *(overview_score(overview, column, overview.row(setting, column)) for column in overview.columns),
        ]
        for setting in overview.settings
    ]
    headings = ["setting", *(column.heading for column in overview.columns)]
    title = f"accuracy or perplexity, [95 % interval], * differs from {overview.base}"
    tables = [Lines(title, headings, scores, numbers_first=False)]
    differing = overview.differing
    if differing:
        others = [setting for setting in overview.settings if setting != overview.base]
        cells = [
            [setting, *(difference(overview.row(setting, column), column.comparison) for column in differing)]
            for setting in others
        ]
        to_base = f"difference to {overview.base}"
        title = f"{to_base} (perplexity: in nats per token), [95 % interval], * more than chance"
        body = [line for line in cells if set(line[1:]) != {NOTHING}]
        headings = [to_base, *(column.heading for column in differing)]
        tables.append(Lines(title, headings, body, numbers_first=False))
    return tables


def overview_name(overview: Overview, setting: str) -> str:
    """A setting's first cell: which it is, and whether it is the base."""
    return setting + (" (base)" if setting == overview.base else "")


def overview_score(overview: Overview, column: Column, row: ComparisonRow | None) -> str:
    """A setting's cell: its score, and a mark where it differs from the base."""
    if row is None:
        return NOTHING
    mark = _star(row) if overview.has_base(column.comparison) else ""
    return score(row, column.comparison.measure) + mark


def markdown(tables: Sequence[Lines]) -> str:
    """Pipe tables."""
    return "\n".join(map(pipe_table, tables))


def pipe_table(table: Lines) -> str:
    """One table as GitHub-flavoured Markdown."""
    rule = ["---:" if table.numbers_first else "---"] + ["---"] * (len(table.headings) - 1)
    body = [table.headings, rule, *table.body]
    return "".join("| " + " | ".join(map(markdown_cell, line)) + " |\n" for line in body)


def markdown_cell(text: str) -> str:
    """Text that neither ends a cell nor is read as HTML."""
    for character, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(character, safe)
    return text


def terminal(contents: Sequence[Lines]) -> RenderableType:
    """rich tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables = []
    for content in contents:
        table = Table(title=content.title, show_lines=any("\n" in cell for line in content.body for cell in line))
        for number, heading in enumerate(content.headings):
            table.add_column(Text(heading), justify="right" if content.numbers_first and not number else "left")
        for line in content.body:
            # Broken here by us rather than anywhere by a narrow terminal.
            cells = [cell.replace(" [", "\n[") for cell in line] if len(line) > WIDE else line
            table.add_row(*map(Text, cells))
        tables.append(table)
    return tables[0] if len(tables) == 1 else Group(*tables)


def tokens(length: int | None) -> str:
    """A length in words."""
    return "none" if length is None else f"{length:,} tokens"


def score(row: ComparisonRow, measure: Measure) -> str:
    """A run's own score with its interval, in one line: "0.95 [0.90, 0.98]"."""
    shown, low, high = row.score, row.ci_low, row.ci_high
    if measure == "accuracy":
        return f"{shown:.2f}" if low is None or high is None else f"{shown:.2f} [{low:.2f}, {high:.2f}]"
    bounds = "" if low is None or high is None else f" [{_perplexity(low)}, {_perplexity(high)}]"
    return _perplexity(shown) + bounds


def overall_scores(run: Run) -> dict[str, str]:
    """What a run of accuracies has over all lengths: RULER's averages, and how far it reaches; by heading."""
    if run.measure == "loss":
        return {}
    averages = {word: f"{run.summary[name]:.2f}" for name, word in AVERAGES.items() if name in run.summary}
    reach = {word: _reach(run.summary[name]) for name, word in REACHES.items()}
    return {**averages, **reach}


def _reach(length: int | None) -> str:
    return "none" if length is None else f"{length:,}"


def _words(overall: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(word for scores in overall for word in scores))


def _runs_side_by_side(comparison: Comparison) -> Lines:
    body = [
        [str(part), *(_whole(comparison.row(run.name, part), comparison) for run in comparison.runs)]
        for part in comparison.parts
    ]
    overall = [overall_scores(run) for run in comparison.runs]
    body += [[word, *(scores.get(word, NOTHING) for scores in overall)] for word in _words(overall)]
    first = "length" if comparison.measure == "accuracy" else "position"
    title = f"{_score_name(comparison)}, [95 % interval], difference to {comparison.base}"
    return Lines(title, [first, *(run.heading for run in comparison.runs)], body, numbers_first=True)


def _runs_below_each_other(comparison: Comparison) -> Lines:
    overall = [overall_scores(run) for run in comparison.runs]
    words = _words(overall)
    body = [
        [
            run.heading + (" (base)" if run.name == comparison.base else ""),
            *(_brief(comparison.row(run.name, part), comparison.measure) for part in comparison.parts),
            *(scores.get(word, NOTHING) for word in words),
        ]
        for run, scores in zip(comparison.runs, overall, strict=True)
    ]
    headings = ["run", *map(str, comparison.parts), *words]
    title = f"{_score_name(comparison)}, [95 % interval], * differs from {comparison.base}"
    return Lines(title, headings, body, numbers_first=False)


def _differences(comparison: Comparison) -> Lines:
    body = [
        [run.heading, *(difference(comparison.row(run.name, part), comparison) for part in comparison.parts)]
        for run in comparison.runs
        if run.name != comparison.base
    ]
    unit = " in nats per token" if comparison.measure == "loss" else ""
    title = f"difference to {comparison.base}{unit}, [95 % interval], * more than chance"
    return Lines(title, [f"difference to {comparison.base}", *map(str, comparison.parts)], body, numbers_first=False)


def _single_tasks(comparison: Comparison) -> Lines:
    body = [
        [f"{part.task}", str(part)]
        + [_brief(comparison.row(run.name, part), comparison.measure) for run in comparison.runs]
        for part in comparison.task_parts
    ]
    title = f"single tasks: {_score_name(comparison)}, [95 % interval], * differs from {comparison.base}"
    return Lines(title, ["task", "length", *(run.heading for run in comparison.runs)], body, numbers_first=False)


def _whole(row: ComparisonRow | None, comparison: Comparison) -> str:
    """A run's cell beside others: its score, and its difference to the base."""
    if row is None:
        return NOTHING
    own = f"{score(row, comparison.measure)} n={row.n}"
    if row.difference is None:
        return own
    shared = "" if row.shared == row.n else f"\n({row.shared} shared)"
    return f"{own}\n{_with_interval(row, comparison)} p={row.p_adjusted:.2g}{_star(row)}{shared}"


def difference(row: ComparisonRow | None, comparison: Comparison) -> str:
    """A run's cell in the table of differences: "+0.12 [+0.03, +0.21]", and a mark where it is more than chance."""
    return NOTHING if row is None or row.difference is None else _with_interval(row, comparison) + _star(row)


def _with_interval(row: ComparisonRow, comparison: Comparison) -> str:
    places = 2 if comparison.measure == "accuracy" else 3
    return f"{row.difference:+z.{places}f}{difference_interval(row, places)}"


def _brief(row: ComparisonRow | None, measure: Measure) -> str:
    return NOTHING if row is None else score(row, measure) + _star(row)


def difference_interval(row: ComparisonRow, places: int) -> str:
    """The interval of a difference in brackets, after a space; empty where there is none."""
    if row.difference_low is None or row.difference_high is None:
        return ""
    return f" [{row.difference_low:+z.{places}f}, {row.difference_high:+z.{places}f}]"


def _star(row: ComparisonRow) -> str:
    return "*" if row.real else ""


def _score_name(comparison: Comparison) -> str:
    return "accuracy" if comparison.measure == "accuracy" else "perplexity"


def _perplexity(loss: float) -> str:
    value = perplexity(loss)
    return "over 1e304" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.2g}"
