"""`ropepatch plot`: a figure from evaluation folders, or of how a model knows order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropepatch.cli._order import KINDS as ORDER_KINDS
from ropepatch.cli._order import Wish, draw
from ropepatch.cli._shared import (
    MODEL_HELP,
    PatchOption,
    SetOption,
    check_patch_options,
    parse_floats,
    parse_settings,
    say,
)
from ropepatch.errors import UsageError, unknown_name

FOLDER_KINDS = ("curve", "distance", "heatmap", "loss", "training")
KINDS = (*FOLDER_KINDS, *ORDER_KINDS)


def main(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of: {', '.join(KINDS)}.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it: .png or .svg.", show_default=False),
    ],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR ...]", help="Output folders of evaluations; of distance: JSON files."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help=MODEL_HELP)] = None,
    patch: PatchOption = None,
    settings: SetOption = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens (positions) that the figure covers.")
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", help="Which table or attention to draw, by a part of its name.")
    ] = None,
    theta: Annotated[
        str, typer.Option("--theta", metavar="T[,T...]", help="Bases, for a table or rotation without a model.")
    ] = "10000",
    dim: Annotated[int, typer.Option("--dim", help="Dimensions, for a table or rotation without a model.")] = 128,
) -> None:
    """Draw a figure from evaluation folders, or of how a model knows order.

    Of evaluation folders. heatmap: accuracy by length and depth (or task), one panel a run, all on one scale. curve:
    accuracy against length, one line a run, with intervals. loss: loss against position, of perplexity runs. distance:
    where the heads look, from files of `attention_distance(...).to_dict()`. training: loss against step, of folders of
    `ropepatch train`. A run that is still going, or was interrupted, is drawn with what it has.

    Of a model, before and after a patch. table: its position table. likeness: the cosine of all pairs of rows. decay:
    what is left of a match over the distance. wavelengths: of every plane, against the trained length. planes: where
    positions point in some of them. bias: what is added to the scores by distance, a line a head. remap: the distance
    between every query and key as it is rotated. table, likeness, decay, wavelengths and planes need no model: they
    then show sines and cosines, or a plain rotation.

    \b
    Examples:
      ropepatch plot heatmap runs/base --output base.png
      ropepatch plot curve runs/base runs/yarn --output both.svg
      ropepatch plot loss runs/base-ppl runs/yarn-ppl --output loss.png
      ropepatch plot table --length 50 --dim 128 --output sinusoids.png
      ropepatch plot decay --theta 10000,500000 --output decay.png
      ropepatch plot wavelengths --model demo:smollm2 --patch yarn --set factor=4 --output ramp.png
      ropepatch plot remap --model demo:smollm2 --patch self_extend --set factor=4 --output remap.svg
    """
    if kind not in KINDS:
        raise unknown_name("kind of figure", kind, KINDS)
    check_patch_options(patch, settings)
    if kind in ORDER_KINDS:
        if folders:
            raise UsageError(f"a {kind} is drawn of a model, not of folders", given=str(folders[0]), hint="use --model")
        if patch is not None and model is None:
            raise UsageError("--patch needs --model", given=patch)
        thetas = parse_floats(theta, name="--theta")
        if any(not value > 1 for value in thetas):
            raise UsageError("a base is above 1", given=theta)
        draw(kind, Wish(model, patch, parse_settings(settings), length, dim, thetas, site, output))
    else:
        for flag, value in (("--model", model), ("--patch", patch), ("--length", length), ("--site", site)):
            if value is not None:
                raise UsageError(f"{flag} does not go with a {kind}, which is drawn from folders", given=value)
        if not folders:
            raise UsageError(f"a {kind} is drawn from folders, and none was named")
        _draw_folders(kind, folders, output)
    say(f"wrote {output}")


def _draw_folders(kind: str, folders: list[Path], output: Path) -> None:
    from ropepatch import plotting
    from ropepatch.evaluation.compare import read_run
    from ropepatch.files import read_object

    if kind == "distance":
        plotting.distance_heatmap([read_object(file) for file in folders], path=output)
        return
    if kind == "training":
        from ropepatch.training.log import read_folder

        logs = [read_folder(folder) for folder in folders]
        plotting.training_curve(logs, titles=[str(folder) for folder in folders], path=output)
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
    figures = {"curve": plotting.accuracy_curve, "heatmap": plotting.heatmap, "loss": plotting.loss_by_position}
    figures[kind]([run.summary for run in runs], path=output)
