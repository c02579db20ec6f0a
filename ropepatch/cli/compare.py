"""`ropepatch compare`: evaluation runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropepatch.cli._shared import JsonOption, print_json, say
from ropepatch.errors import UsageError


def main(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR ...", help="Output folders; the first is the base.")
    ],
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write a self-contained HTML page.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show evaluation runs side by side: accuracy with 95 % intervals, and differences to the first run.

    Differences are taken on the trials that both runs have, with McNemar's exact test. Runs of other tasks, other
    questions or without a shared length are refused.

    \b
    Examples:
      ropepatch compare runs/base runs/yarn
      ropepatch compare runs/base runs/yarn runs/ntk --report comparison.html
      ropepatch compare runs/base runs/yarn --json
    """
    if markdown and as_json:
        raise UsageError("choose one of --markdown and --json")
    from ropepatch.evaluation.compare import compare

    comparison = compare(folders)
    if report is not None:
        from ropepatch.evaluation.report import write_comparison_report

        write_comparison_report(comparison, report)
        say(f"wrote {report}")
    if as_json:
        print_json(comparison.to_dict())
    elif markdown:
        typer.echo(comparison.to_markdown(), nl=False)
    else:
        from rich.console import Console

        Console().print(comparison.table())
        typer.echo(comparison.explanation())
