"""`ropepatch compare`: evaluation runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropepatch.cli._shared import JsonOption, print_json, say
from ropepatch.errors import UsageError

if TYPE_CHECKING:
    from ropepatch.evaluation.comparison import Comparison


def main(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR ...", help="Output folders; the first is the base.")
    ],
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Order of the runs: a length, name, effective, or perplexity. [default: as given]"
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
    adjusted for being several (Holm). Runs of other tasks, other questions or without a shared length are refused. Up
    to four runs are columns; more are rows.

    \b
    Examples:
      ropepatch compare runs/base runs/yarn
      ropepatch compare runs/* --sort 16384 --report comparison.html
      ropepatch compare runs/base runs/yarn --csv trials.csv --json
      ropepatch compare runs/yarn --card
    """
    if sum((markdown, card, as_json)) > 1:
        raise UsageError("choose one of --markdown, --card and --json")
    from ropepatch.evaluation.compare import compare

    comparison = compare(folders, least=1 if card else 2)
    if sort is not None:
        comparison = comparison.sorted_by(sort)
    _write_files(comparison, report, csv, parquet)
    if as_json:
        print_json(comparison.to_dict())
    elif markdown:
        typer.echo(comparison.to_markdown(), nl=False)
    elif card:
        from ropepatch.evaluation.model_card import card as model_card

        typer.echo(model_card(comparison), nl=False)
    else:
        import sys

        from rich.console import Console

        # A file or a pipe has no width: the table takes what it needs.
        Console(width=None if sys.stdout.isatty() else 1000).print(comparison.table())
        typer.echo(comparison.explanation())


def _write_files(comparison: Comparison, report: Path | None, csv: Path | None, parquet: Path | None) -> None:
    if report is not None:
        from ropepatch.evaluation.report import write_comparison_report

        write_comparison_report(comparison, report)
        say(f"wrote {report}")
    for path, kind in ((csv, "csv"), (parquet, "parquet")):
        if path is not None:
            from ropepatch.evaluation import export

            (export.write_csv if kind == "csv" else export.write_parquet)(comparison.runs, path)
            say(f"wrote {path}")
