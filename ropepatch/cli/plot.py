"""`ropepatch plot`: a figure from evaluation folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropepatch.cli._shared import say
from ropepatch.errors import unknown_name

KINDS = ("heatmap",)


def main(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of: {', '.join(KINDS)}.", show_default=False)],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR ...", help="Output folders of evaluations.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it: .png or .svg.", show_default=False),
    ],
) -> None:
    """Draw a figure from one or several evaluation folders, side by side on one scale.

    A run that is still going, or was interrupted, is drawn with the trials that it has.

    \b
    Examples:
      ropepatch plot heatmap runs/base --output base.png
      ropepatch plot heatmap runs/base runs/yarn --output both.svg
    """
    if kind not in KINDS:
        raise unknown_name("kind of figure", kind, KINDS)
    from ropepatch.evaluation.compare import read_run
    from ropepatch.plotting import heatmap

    heatmap([read_run(folder).summary for folder in folders], path=output)
    say(f"wrote {output}")
