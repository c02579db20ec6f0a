"""`ropepatch plot`: a figure from evaluation folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropepatch.cli._shared import say
from ropepatch.errors import UsageError, unknown_name

KINDS = ("curve", "distance", "heatmap", "loss")


def main(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of: {', '.join(KINDS)}.", show_default=False)],
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR ...", help="Output folders of evaluations; of distance: JSON files.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it: .png or .svg.", show_default=False),
    ],
) -> None:
    """Draw a figure from one or several evaluation folders.

    heatmap: accuracy by length and depth (or task), one panel a run, all on one scale. curve: accuracy against
    length, one line a run, with intervals. loss: loss against position, of perplexity runs. distance: where
    the heads look, from files of `attention_distance(...).to_dict()`. A run that is still going,
    or was interrupted, is drawn with the trials that it has.

    \b
    Examples:
      ropepatch plot heatmap runs/base --output base.png
      ropepatch plot curve runs/base runs/yarn --output both.svg
      ropepatch plot loss runs/base-ppl runs/yarn-ppl --output loss.png
    """
    if kind not in KINDS:
        raise unknown_name("kind of figure", kind, KINDS)
    from ropepatch import plotting
    from ropepatch.evaluation.compare import read_run
    from ropepatch.files import read_object

    if kind == "distance":
        plotting.distance_heatmap([read_object(file) for file in folders], path=output)
        say(f"wrote {output}")
        return
    runs = [read_run(folder) for folder in folders]
    wanted = "loss" if kind == "loss" else "accuracy"
    for run in runs:
        if run.measure != wanted:
            raise UsageError(
                f"a {kind} shows {wanted}, which {run.path} did not measure",
                given=run.summary["task"],
                hint=f"try: ropepatch plot {'curve' if kind == 'loss' else 'loss'}",
            )
    draw = {"curve": plotting.accuracy_curve, "heatmap": plotting.heatmap, "loss": plotting.loss_by_position}[kind]
    draw([run.summary for run in runs], path=output)
    say(f"wrote {output}")
