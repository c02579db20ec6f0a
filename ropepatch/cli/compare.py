"""`ropepatch compare`: evaluation runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropepatch.cli._shared import JsonOption, parse_ints, print_json, say
from ropepatch.errors import UsageError

if TYPE_CHECKING:
    from ropepatch.evaluation.comparison import Comparison, Run
    from ropepatch.evaluation.overview import Overview


def main(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR ...", help="Output folders, of one suite or several.")
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What differences are to: a folder's name or a title. [default: the first]"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Show these lengths only; p stays adjusted for all. [default: all]"),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Order of the runs: a length, name, effective, or perplexity; of several suites name or SUITE:KEY. "
            "[default: as given]",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write a self-contained HTML page.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write all trials of all runs as CSV.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="The same as Parquet; it needs pyarrow.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Print a Markdown section for a model card; one DIR is enough.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show evaluation runs side by side: accuracy or perplexity with 95 % intervals, and differences to the first run.

    Differences are taken on the trials that both runs have, with intervals and tests for paired trials; p-values are
    adjusted for being several (Holm). Runs with other questions or without a shared length are refused. Up to four
    runs are columns; more are rows.

    Runs of several suites make one table: a row for each patch (and model), whatever folders its runs are in, and a
    column for each suite and length.

    \b
    Examples:
      ropepatch compare runs/base runs/yarn
      ropepatch compare runs/* --base unpatched --sort 16384 --report comparison.html
      ropepatch compare passkey/* ruler/* perplexity/* --base unpatched --lengths 8192,16384 --sort ruler:16384
      ropepatch compare runs/base runs/yarn --csv trials.csv --json
      ropepatch compare runs/yarn --card
    """
    if sum((markdown, card, as_json)) > 1:
        raise UsageError("choose one of --markdown, --card and --json")
    from ropepatch.evaluation.compare import compare_runs, read_runs
    from ropepatch.evaluation.overview import overview_of

    shown = None if lengths is None else parse_ints(lengths, name="--lengths")
    runs = read_runs(folders, least=1 if card else 2)
    found: Comparison | Overview
    if len({run.summary["task"] for run in runs}) > 1:
        found = overview_of(runs, base=base)
    else:
        found = compare_runs(runs, base=base)
    if shown is not None:
        found = found.at(shown)
    if sort is not None:
        found = found.sorted_by(sort)
    if report is not None:
        _write_report(found, report)
    _write_trials(found.runs, csv, parquet)
    if as_json:
        print_json(found.to_dict())
    elif markdown:
        typer.echo(found.to_markdown(), nl=False)
    elif card:
        typer.echo(_card(found), nl=False)
    else:
        import sys

        from rich.console import Console

        # A file or a pipe has no width: the table takes what it needs.
        Console(width=None if sys.stdout.isatty() else 1000).print(found.table())
        typer.echo(found.explanation())


def _card(found: Comparison | Overview) -> str:
    from ropepatch.evaluation.comparison import Comparison
    from ropepatch.evaluation.model_card import card, overview_card

    return card(found) if isinstance(found, Comparison) else overview_card(found)


def _write_report(found: Comparison | Overview, path: Path) -> None:
    from ropepatch.evaluation.comparison import Comparison
    from ropepatch.evaluation.report import write_comparison_report, write_overview_report

    if isinstance(found, Comparison):
        write_comparison_report(found, path)
    else:
        write_overview_report(found, path)
    say(f"wrote {path}")


def _write_trials(runs: Sequence[Run], csv: Path | None, parquet: Path | None) -> None:
    for path, kind in ((csv, "csv"), (parquet, "parquet")):
        if path is not None:
            from ropepatch.evaluation import export

            (export.write_csv if kind == "csv" else export.write_parquet)(runs, path)
            say(f"wrote {path}")
